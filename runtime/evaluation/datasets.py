"""The data sets: published layouts of question files, their readers, and the built-in questions about drawn scenes.

`open_data` takes `tiny`, a file or a folder of questions. To add a data set, write a reader of its entries and add a
`Layout` to `LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import DataSetError, UsageError
from ...models.files import is_file
from ...models.images import ImageSource
from ...models.tiny.questions import NUMBERS, Question, is_right, questions_about
from ...models.tiny.scenes import COLOURS, MAX_SCENES, PLACES, SHAPES, draw_scene, scene_seeds
from .scoring import anls, exact_match, relaxed_accuracy, vqa_accuracy

Metric = Callable[[str, Sequence[str]], float]
"""A function (prediction, answers) -> 0.0 to 1.0."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""The instruction that LLaVA-1.5 (arXiv 2310.03744, table 7) appends to such questions. FastVLM follows its recipe."""


@dataclass(frozen=True)
class Sample:
    """One question about one image."""

    id: str
    """A name that is the same in every run, as two runs are compared by it."""
    image: ImageSource
    question: str
    answers: tuple[str, ...]
    """The right answers. The metric defines how a prediction is compared with them."""
    kind: str
    """The row of the table that the question counts for."""


@dataclass(frozen=True)
class DataSet:
    """Samples with the metric that scores their answers."""

    name: str
    metric: str
    """The name of the metric, for tables."""
    samples: Iterable[Sample]
    count: int
    score: Callable[[Sample, str], float]
    """A function (sample, prediction) -> 0.0 to 1.0."""
    max_tokens: int
    instruction: str = ""
    """The text appended to each question."""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The words between which answers choose, by kind."""
    note: str = ""
    """A remark for readers of the figures."""

    def prompt(self, sample: Sample) -> str:
        """Returns the question with the instruction."""
        return f"{sample.question}\n{self.instruction}" if self.instruction else sample.question


@dataclass(frozen=True)
class Layout:
    """One form of question files: JSON objects in a list, in a list under `data`, or one per line."""

    name: str
    metric_name: str
    metric: Metric
    keys: tuple[str, ...]
    """The keys by which the first entry of such a file is recognised."""
    read: Callable[[list[dict[str, Any]], Path], Iterator[Sample]]
    """A function (entries, file) -> samples, with `image` as named in the file. Malformed entries may raise KeyError,
    TypeError, ValueError or AttributeError."""
    image_folders: tuple[str, ...] = ("images",)
    """The folders, next to the file or one level up, that are searched for images."""
    instruction: str = SHORT_ANSWER
    max_tokens: int = 32
    many_files: bool = False
    """True if one split comes in several files."""


QUESTIONS_STREAM = 2
"""The stream of a scene's random numbers that draws its questions. Streams 0 and 1 draw the layout and the paint."""


def read_textvqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads TextVQA (https://textvqa.org): `TextVQA_0.5.1_{train,val}.json` and `train_images/IMAGE_ID.jpg`.

    Each question has the answers of ten people. The answers of the test split are not published.
    """
    for entry in entries:
        yield Sample(
            id=str(entry["question_id"]),
            image=f"{entry['image_id']}.jpg",
            question=entry["question"],
            answers=tuple(entry.get("answers", ())),
            kind="text",
        )


def read_chartqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads ChartQA (https://github.com/vis-nlp/ChartQA): `test/test_{human,augmented}.json` and `test/png/NAME.png`.

    The part of the split (`human`, `augmented`) is only in the file's name, and entries have no ids.
    """
    part = file.stem.rpartition("_")[2]
    for index, entry in enumerate(entries):
        yield Sample(
            id=f"{part}-{index}",
            image=entry["imgname"],
            question=entry["query"],
            answers=(str(entry["label"]),),
            kind=part,
        )


def read_docvqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads DocVQA, task 1 (https://rrc.cvc.uab.es/?ch=17): `{train,val}_v1.0_withQT.json` and `documents/NAME.png`.

    A question's kind is the first of its types. In files without types every question has one kind.
    """
    for entry in entries:
        yield Sample(
            id=str(entry["questionId"]),
            image=entry["image"],
            question=entry["question"],
            answers=tuple(entry.get("answers", ())),
            kind=next(iter(entry.get("question_types") or ()), "document"),
        )


def read_own_questions(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads a user's own questions: a JSON list, or an object per line, of `image`, `question` and `answer`.

    `answer` may be a list of right answers. `kind` and `id` are optional. Image paths are relative to the file.
    """
    for index, entry in enumerate(entries):
        answer = entry["answer"]
        yield Sample(
            id=str(entry.get("id", index)),
            image=entry["image"],
            question=entry["question"],
            answers=tuple(answer) if isinstance(answer, list) else (str(answer),),
            kind=str(entry.get("kind", "question")),
        )


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="textvqa",
            metric_name="VQA accuracy",
            metric=vqa_accuracy,
            keys=("question_id", "image_id", "question"),
            read=read_textvqa,
            image_folders=("train_images", "test_images", "images"),
        ),
        Layout(
            name="chartqa",
            metric_name="relaxed accuracy",
            metric=relaxed_accuracy,
            keys=("imgname", "query", "label"),
            read=read_chartqa,
            image_folders=("png", "images"),
            many_files=True,
        ),
        Layout(
            name="docvqa",
            metric_name="ANLS",
            metric=anls,
            keys=("questionId", "image", "question"),
            read=read_docvqa,
            image_folders=("documents", "spdocvqa_images", "images"),
            max_tokens=64,
        ),
        Layout(
            name="questions",
            metric_name="exact match",
            metric=exact_match,
            keys=("image", "question", "answer"),
            read=read_own_questions,
            instruction="",
            max_tokens=64,
        ),
    )
}
"""The layouts by name, in the order in which a file is tried."""


def tiny_questions(count: int) -> DataSet:
    """Returns the first `count` questions about the held-out scenes of `tiny`, up to seven per scene.

    The scenes are drawn while they are asked about.
    """
    return DataSet(
        name="tiny",
        metric="exact; descriptions by what they name",
        samples=islice(held_out(), count),
        count=count,
        score=score_tiny,
        max_tokens=96,
        categories={"colour": tuple(COLOURS), "shape": SHAPES, "count": NUMBERS, "where": PLACES},
    )


def held_out() -> Iterator[Sample]:
    """Draws the held-out scenes in order and yields the questions about each."""
    for number, seed in enumerate(scene_seeds("heldout", MAX_SCENES)):
        scene = draw_scene(seed)
        image = scene.image()
        draw = np.random.Generator(np.random.PCG64([seed, QUESTIONS_STREAM]))
        for question in questions_about(scene, draw):
            yield Sample(f"{number}-{question.kind}", image, question.text, (question.answer,), question.kind)


def score_tiny(sample: Sample, prediction: str) -> float:
    """Returns 1.0 for a right answer about a drawn scene, else 0.0."""
    return float(is_right(Question(sample.kind, sample.question, sample.answers[0]), prediction))


DEFAULT_LIMIT = 2000
"""The number of questions that an evaluation asks by default."""
MAX_FILE_BYTES = 2**29
"""The largest file of questions that is read, in bytes. TextVQA's training questions take a tenth of it."""
MAX_VALUES = 10_000_000
"""The most JSON values that a file may have. Python takes about 100 bytes for each, however short it is in the file."""
HEAD_BYTES = 2**16
"""The bytes from the start of a file in which the keys of its layout must appear."""


def open_data(
    data: str | Path, limit: int = DEFAULT_LIMIT, task: str | None = None, images: Path | None = None
) -> DataSet:
    """Returns at most `limit` questions (0: all) of `tiny`, or of a file or folder.

    A file's layout is recognised by its content, unless `task` names it. The choice of questions is the same each
    time, and a smaller limit chooses a subset of a larger one. `images` is a folder that is searched for images
    before the folders of the layout.

    Raises:
        UsageError: `limit` or `task` is invalid.
        DataSetError: the path has no questions, they are malformed, or images are missing.
    """
    if limit < 0 or (limit == 0 and data == "tiny"):
        raise UsageError(f"limit must be at least 1, or 0 for all questions of a file (got {limit}).", "limit")
    if task is not None and task not in LAYOUTS:
        raise UsageError(f"task must be one of {', '.join(LAYOUTS)} (got {task!r:.40}).", "task")
    if data == "tiny":
        return tiny_questions(limit)
    path = Path(data).expanduser()
    found, files = recognised(question_files(path), task, path)
    return data_set(found, files, limit, images)


def question_files(path: Path) -> list[Path]:
    """Returns the file itself, or the JSON files in a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataSetError(f"{path} is neither 'tiny' nor a file or folder of questions. Check the path.")
    return sorted(file for file in path.glob("[!.]*") if file.suffix in (".json", ".jsonl") and file.is_file())


def recognised(files: list[Path], name: str | None, path: Path) -> tuple[Layout, list[Path]]:
    """Returns the layout and the files in it. Raises DataSetError unless they are one split of one data set."""
    for layout in [LAYOUTS[name]] if name else LAYOUTS.values():
        found = [file for file in files if begins_like(file, layout)]
        if len(found) > 1 and not layout.many_files:
            names = ", ".join(file.name for file in found[:4])
            raise DataSetError(f"{path} has {len(found)} files of questions ({names}). Pass one of them.")
        if found:
            return layout, found
    wanted = name or f"one of {', '.join(LAYOUTS)}"
    raise DataSetError(f"{path} has no file of questions with the layout {wanted}. Check the keys of its entries.")


def begins_like(file: Path, layout: Layout) -> bool:
    """Returns True if the file begins with an entry of this layout. Only its head is read, as files may be large."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES).decode(errors="replace")
    except OSError as reason:
        raise DataSetError(f"{file} cannot be read: {reason.strerror}.") from None
    return all(re.search(rf'"{key}"\s*:', head) for key in layout.keys)


def data_set(layout: Layout, files: list[Path], limit: int, images: Path | None) -> DataSet:
    """Returns the data set of `limit` questions (0: all) from files of one layout. Raises DataSetError."""
    whole = [(sample, file) for file in files for sample in read_samples(layout, file)]
    chosen = by_image(choose(whole, limit))
    samples = with_images(chosen, layout, images)
    shown = len(samples) < len(whole)
    return DataSet(
        name=layout.name,
        metric=layout.metric_name,
        samples=samples,
        count=len(samples),
        score=lambda sample, prediction: layout.metric(prediction, sample.answers),
        max_tokens=layout.max_tokens,
        instruction=layout.instruction,
        note=f"{len(samples):,} of {len(whole):,} questions, the same each time" if shown else "",
    )


def read_samples(layout: Layout, file: Path) -> Iterator[Sample]:
    """Yields the samples of a file, each checked. Raises DataSetError."""
    samples, ids = layout.read(read_entries(file), file), set[str]()
    while True:
        try:
            sample = next(samples, None)
        except (KeyError, TypeError, ValueError, AttributeError) as reason:
            problem = f"{reason} is missing" if isinstance(reason, KeyError) else str(reason)
            raise DataSetError(
                f"{file}: entry {len(ids) + 1} is not a valid {layout.name} question: {problem}."
            ) from None
        if sample is None:
            return
        check(sample, file)
        if sample.id in ids:
            raise DataSetError(
                f"{file}: two questions have the id {sample.id!r:.60}. Give each its own, as runs are compared by ids."
            )
        ids.add(sample.id)
        yield sample


def check(sample: Sample, file: Path) -> None:
    """Raises DataSetError if a sample has no answers, or values that are not strings."""
    if not sample.answers:
        raise DataSetError(
            f"{file}: question {sample.id!r:.60} has no answers. Use a split with published answers, not a test split."
        )
    if not all(isinstance(text, str) for text in (sample.image, sample.question, sample.kind, *sample.answers)):
        raise DataSetError(f"{file}: question {sample.id!r:.60}: image, question and answers must be strings.")


def choose(whole: list[tuple[Sample, Path]], limit: int) -> list[tuple[Sample, Path]]:
    """Returns `limit` of the samples (0: all) in their order, chosen by a digest of their ids."""
    if limit == 0 or limit >= len(whole):
        return whole
    spread = sorted(whole, key=lambda pair: hashlib.blake2b(pair[0].id.encode()).digest())
    ids = {id(pair) for pair in spread[:limit]}
    return [pair for pair in whole if id(pair) in ids]


def by_image(chosen: list[tuple[Sample, Path]]) -> list[tuple[Sample, Path]]:
    """Returns the samples with all questions about an image together, so that it is encoded once."""
    first: dict[Any, int] = {}
    for sample, _ in chosen:
        first.setdefault(sample.image, len(first))
    return sorted(chosen, key=lambda pair: first[pair[0].image])


def with_images(chosen: list[tuple[Sample, Path]], layout: Layout, images: Path | None) -> list[Sample]:
    """Returns the samples with the paths of existing images. Raises DataSetError if images are missing."""
    found = [(sample, find_image(str(sample.image), file, layout, images)) for sample, file in chosen]
    missing = [sample for sample, path in found if path is None]
    if missing:
        name = f"{missing[0].image!s:.200}"
        raise DataSetError(
            f"{chosen[0][1]}: {len(missing)} of {len(found)} questions lack their image, such as {name}. "
            "Put the files next to it, or pass their folder as images=FOLDER.",
            "images",
        )
    return [dataclasses.replace(sample, image=path) for sample, path in found if path is not None]


def find_image(name: str, file: Path, layout: Layout, images: Path | None) -> Path | None:
    """Returns the first existing path of an image: in `images`, next to the file, or one folder up."""
    bases = [images] if images else []
    for folder in (file.parent, file.parent.parent):
        bases += [folder, *(folder / inner for inner in layout.image_folders)]
    places = (base / part for base in bases for part in dict.fromkeys((name, Path(name).name)))
    return next((place for place in places if is_file(place)), None)


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON list, of a list under `data`, or of the lines of a file. Raises DataSetError."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataSetError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB. Split it into several files.")
        text = file.read_text(encoding="utf-8")
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise DataSetError(f"{file} has more than {MAX_VALUES:,} values. Split it into several files.")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataSetError(f"{file} cannot be read: {getattr(reason, 'strerror', None) or reason}.") from None
    try:
        lines = file.suffix == ".jsonl"
        values = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise DataSetError(f"{file} is not valid JSON: {reason}.") from None
    entries = values.get("data") if isinstance(values, dict) else values
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataSetError(f"{file} must be a list of objects, or have one under 'data'.")
    return entries
