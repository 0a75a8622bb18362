"""The pictures of an evaluation: the plot of its accuracy, and the sheet of its sample images and answers.

The plot needs matplotlib, an optional dependency. The sheet needs only Pillow.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...models.errors import ImageError, MachineError
from ...models.images import open_image
from .run import Answer, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
"""The number of confusion tables in a row of the figure."""
OTHER = "other"
"""The label of the last column, which counts answers with none of the words."""
BAR_COLOUR, ALL_COLOUR = "#3b6ea8", "#274768"


def require_matplotlib(instead: str = "--samples") -> None:
    """Raises MachineError unless matplotlib is installed. The message recommends the option `instead`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MachineError(
            f'--plot needs matplotlib. Run `pip install "fastvlm[plot]"`, or use {instead}, which works without it.'
        )


def accuracy_figure(evaluation: Evaluation) -> Figure:
    """Draws bars with 95 % intervals, and a confusion table for each kind whose answers choose between words."""
    from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps figures alive

    tables = _tables(evaluation)
    rows = -(-len(tables) // COLUMNS)
    width, height = (6.5 + (4.6 * COLUMNS if tables else 0), max(3.6, 4.2 * rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(max(rows, 1), 1 + (COLUMNS if tables else 0), width_ratios=_widths(bool(tables)))
    figure.suptitle(escaped(evaluation.title), fontsize=11)
    draw_bars(figure.add_subplot(grid[:, 0]), evaluation)
    for index, (kind, words, counts) in enumerate(tables):
        axes = figure.add_subplot(grid[index // COLUMNS, 1 + index % COLUMNS])
        draw_table(axes, kind, words, counts)
    return figure


def draw_bars(axes: Axes, evaluation: Evaluation) -> None:
    """Draws the accuracy of each kind with its 95 % interval."""
    rows = evaluation.rows
    places = np.arange(len(rows))[::-1]
    shares = np.array([100 * row.accuracy for row in rows.values()])
    low = shares - [100 * row.low for row in rows.values()]
    high = np.array([100 * row.high for row in rows.values()]) - shares
    colours = [BAR_COLOUR] * (len(rows) - 1) + [ALL_COLOUR]
    axes.barh(places, shares, xerr=np.clip([low, high], 0, None), color=colours, height=0.62, ecolor="#555", capsize=3)
    for place, share, row in zip(places, shares, rows.values(), strict=True):
        axes.text(103, place, f"{share:.1f}%\n{row.n:,}", va="center", fontsize=8, color="#333")
    axes.set_yticks(places, [plain(kind) for kind in rows])
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy in percent, with its 95% interval; number of questions")
    axes.spines[["top", "right"]].set_visible(False)


def draw_table(axes: Axes, kind: str, words: tuple[str, ...], counts: np.ndarray) -> None:
    """Draws counts with a row per expected word and a column per given word. Shades are shares of a row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.6 else "#222"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(words) + 1), [*words, OTHER], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.set_title(kind, fontsize=10)
    axes.set_xlabel("given", fontsize=8)
    axes.set_ylabel("expected", fontsize=8)


def mixups(answers: Sequence[Answer], words: Sequence[str]) -> np.ndarray:
    """Returns (W, W + 1) counts, int64: rows by the expected word, columns by the given word, the last one for neither.

    Answers whose expected text has none of the words are left out.
    """
    counts = np.zeros((len(words), len(words) + 1), np.int64)
    for answer in answers:
        expected = word_in(answer.sample.answers[0], words)
        if expected is not None:
            given = word_in(answer.text or "", words)
            counts[words.index(expected), len(words) if given is None else words.index(given)] += 1
    return counts


def word_in(text: str, words: Sequence[str]) -> str | None:
    """Returns the first of `words` in `text`, or None. The longest of several wins ('top left' over 'top')."""
    longest_first = sorted(words, key=len, reverse=True)
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text.lower())
    return found[0] if found else None


def _tables(evaluation: Evaluation) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """Returns (kind, words, counts) for each kind with answers."""
    found = []
    for kind, words in evaluation.data.categories.items():
        counts = mixups([one for one in evaluation.answers if one.sample.kind == kind], words)
        if counts.any():
            found.append((kind, words, counts))
    return found


def _widths(with_tables: bool) -> list[float]:
    return [1.3, *([1.0] * COLUMNS)] if with_tables else [1.0]


def plain(text: str, most: int = 60) -> str:
    """Returns the last `most` characters of untrusted text, printable and without formula signs."""
    return escaped("".join(c for c in text if c.isprintable())[-most:])


def escaped(text: str) -> str:
    """Returns text in which matplotlib does not find formulas."""
    return text.replace("$", r"\$")


CELLS = 24
"""The number of answers on a sheet."""
SHEET_COLUMNS = 6
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
    columns = min(SHEET_COLUMNS, len(chosen))
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
