"""Opening a data set: `tiny`, a file or a folder of questions -> `DataSet`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...models.errors import DataSetError, UsageError
from ...models.files import is_file
from .datasets import LAYOUTS, tiny_questions
from .samples import DataSet, Layout, Sample

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
