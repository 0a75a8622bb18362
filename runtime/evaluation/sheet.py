"""The sheet of sample images with questions and answers, right and wrong. It needs only Pillow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...models.errors import ImageError
from ...models.images import open_image
from .report import Answer, Evaluation

CELLS = 24
"""The number of answers on a sheet."""
COLUMNS = 6
PICTURE = 232
"""The side of an image's square in pixels."""
PAD = 14
LINE = 18
LINES = 6
"""The most lines of text below an image."""
HEAD = 52

GROUND, CARD, INK, FAINT = (238, 239, 241), (255, 255, 255), (32, 33, 36), (110, 114, 120)
RIGHT, PARTLY, WRONG = (30, 132, 73), (190, 130, 20), (196, 43, 40)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sample_sheet(evaluation: Evaluation) -> Image.Image:
    """Draws up to `CELLS` answers of every kind, half of them wrong if there are enough. The title has the accuracy."""
    chosen = choose(evaluation.answers)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    cell_width, cell_height = PICTURE + 2 * PAD, PICTURE + LINES * LINE + 3 * PAD
    head = ((8, INK, 20, title(evaluation)), (32, FAINT, 12, shown(evaluation, chosen)))
    texts = [(top, ink, line, ImageFont.load_default(size)) for top, ink, size, line in head]
    least = max(math.ceil(font.getlength(line)) + 2 * PAD for *_, line, font in texts)
    size = (max(columns * (cell_width + PAD) + PAD, least), HEAD + rows * (cell_height + PAD))
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for top, ink, line, font in texts:
        pen.text((PAD, top), line, ink, font)
    for index, answer in enumerate(chosen):
        left, top = PAD + index % columns * (cell_width + PAD), HEAD + index // columns * (cell_height + PAD)
        pen.rounded_rectangle((left, top, left + cell_width, top + cell_height), 8, CARD)
        sheet.paste(thumbnail(answer), (left + PAD, top + PAD))
        write_text(pen, answer, left + PAD, top + PICTURE + 2 * PAD)
    return sheet


def title(evaluation: Evaluation) -> str:
    """Returns the model, the data set and the accuracy."""
    return f"{evaluation.title}, {evaluation.accuracy:.1%} right"


def shown(evaluation: Evaluation, chosen: Sequence[Answer]) -> str:
    """Returns the counts of the chosen answers, which are not a fair sample."""
    right, wrong = (sum(one.score == score for one in chosen) for score in (1, 0))
    partly = f", {len(chosen) - right - wrong} partly right" if right + wrong < len(chosen) else ""
    return f"shown: {len(chosen)} of {len(evaluation.answers):,} answers, {right} right{partly}, {wrong} wrong"


def choose(answers: tuple[Answer, ...], cells: int = CELLS) -> list[Answer]:
    """Chooses wrong and right answers of all kinds about different images, in the order of the run."""
    right, wrong = ([one for one in answers if (one.score == 1) == full] for full in (True, False))
    seen: set[str | int] = set()
    taken = in_turn(wrong, max(cells // 2, cells - len(right)), seen)
    taken += in_turn(right, cells - len(taken), seen)
    order = {id(answer): index for index, answer in enumerate(answers)}
    return sorted(taken, key=lambda answer: order[id(answer)])


def in_turn(answers: list[Answer], count: int, seen: set[str | int]) -> list[Answer]:
    """Takes `count` answers, one kind after the other, with images that are not in `seen` first."""
    pools: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        pools[answer.sample.kind].append(answer)
    taken: list[Answer] = []
    while len(taken) < count and any(pools.values()):
        for pool in filter(None, pools.values()):
            fresh = (index for index, one in enumerate(pool) if image_key(one) not in seen)
            taken.append(pool.pop(next(fresh, 0)))
            seen.add(image_key(taken[-1]))
    return taken[:count]


def image_key(answer: Answer) -> str | int:
    """Returns a key that is equal for answers about the same image."""
    image = answer.sample.image
    return str(image) if isinstance(image, str | Path) else id(image)


def thumbnail(answer: Answer) -> Image.Image:
    """Returns the image in a square, which stays grey if the image cannot be opened."""
    square = Image.new("RGB", (PICTURE, PICTURE), GROUND)
    try:
        image = open_image(answer.sample.image)
    except ImageError:
        return square
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    square.paste(image, ((PICTURE - image.width) // 2, (PICTURE - image.height) // 2))
    return square


def write_text(pen: ImageDraw.ImageDraw, answer: Answer, left: int, top: int) -> None:
    """Writes the question, the answer in the colour of its score, and the expected answer if that differs."""
    font = ImageFont.load_default(13)
    colour = RIGHT if answer.score == 1 else PARTLY if answer.score > 0 else WRONG
    lines = [(line, INK) for line in wrapped(answer.sample.question, font, 2)]
    text, most = answer.text or answer.error or "(nothing)", 2 if answer.score < 1 else LINES - len(lines)
    lines += [(line, colour) for line in wrapped(text, font, most)]
    if answer.score < 1:
        lines += [(line, FAINT) for line in wrapped(f"expected: {answer.sample.answers[0]}", font, LINES - len(lines))]
    for number, (line, ink) in enumerate(lines):
        pen.text((left, top + number * LINE), line, ink, font)


def wrapped(text: str, font: Font, most: int) -> list[str]:
    """Breaks `text` into at most `most` lines of the image's width, cut with an ellipsis."""
    lines: list[str] = []
    rest = "".join(c if c.isprintable() else " " for c in text).split()
    while rest and len(lines) < most:
        line, rest = rest[0], rest[1:]
        while rest and font.getlength(f"{line} {rest[0]}") <= PICTURE:
            line, rest = f"{line} {rest[0]}", rest[1:]
        lines.append(fitted(line, font))
    if rest:
        lines[-1] = fitted(f"{lines[-1]} …", font)
    return lines


def fitted(line: str, font: Font) -> str:
    """Returns `line`, cut with an ellipsis if it is wider than the image."""
    if font.getlength(line) <= PICTURE:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(f"{line}…") > PICTURE:
        line = line[:-1]
    return f"{line}…"
