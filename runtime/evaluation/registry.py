"""`tiny`, a file or a folder of questions -> the data set in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...models.errors import DataSetError, UsageError
from ...models.paths import is_file
from . import chartqa, docvqa, own_questions, textvqa
from .samples import DataSet, Layout, Sample

LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (textvqa, chartqa, docvqa, own_questions)
}  # fmt: skip
"""By name, in the order in which a file is tried."""

DEFAULT_LIMIT = 2000
MAX_FILE_BYTES = 2**29
"""TextVQA's training questions take a tenth of it."""
MAX_VALUES = 10_000_000
"""In a file of questions: Python takes some 100 bytes for each, however few the file does."""
HEAD_BYTES = 2**16
"""What a layout is recognised by."""


def open_data(
    data: str | Path, limit: int = DEFAULT_LIMIT, layout: str | None = None, images: Path | None = None
) -> DataSet:
    """At most `limit` questions (0: all) of `tiny` or of what is in a file or folder.

    A file's layout is recognised by its content, or named by `layout`. Of a larger file the same questions are chosen
    each time, and those of a smaller limit are among those of a larger one. `images` is a folder to look for images
    in, before the places where the layout has them.

    Raises:
        UsageError: `limit` or `layout` make no sense.
        DataSetError: there is no file of questions, it is malformed, or images of it are missing.
    """
    if limit < 0 or (limit == 0 and data == "tiny"):
        raise UsageError(f"limit should be from 1, or 0 for all questions of a file; found {limit}")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"a task should be one of {', '.join(LAYOUTS)}; found {layout!r:.40}")
    if data == "tiny":
        from .tiny import tiny_questions

        return tiny_questions(limit)
    path = Path(data).expanduser()
    found, files = recognised(question_files(path), layout, path)
    return data_set(found, files, limit, images)


def question_files(path: Path) -> list[Path]:
    """The file itself, or the JSON files in a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataSetError(f"{path} is neither 'tiny' nor a file or folder of questions")
    return sorted(file for file in path.glob("[!.]*") if file.suffix in (".json", ".jsonl") and file.is_file())


def recognised(files: list[Path], name: str | None, path: Path) -> tuple[Layout, list[Path]]:
    """The layout, and the files that have it. Raises DataSetError unless they are one split of one data set."""
    for layout in [LAYOUTS[name]] if name else LAYOUTS.values():
        found = [file for file in files if begins_like(file, layout)]
        if len(found) > 1 and not layout.many_files:
            names = ", ".join(file.name for file in found[:4])
            raise DataSetError(f"{path} holds {len(found)} files of questions ({names}): name one of them")
        if found:
            return layout, found
    wanted = name or f"one of {', '.join(LAYOUTS)}"
    raise DataSetError(f"{path} holds no file of questions whose layout is {wanted}")


def begins_like(file: Path, layout: Layout) -> bool:
    """Whether a file begins with an entry of this layout; its whole may be hundreds of megabytes."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES).decode(errors="replace")
    except OSError as reason:
        raise DataSetError(f"{file} cannot be read: {reason.strerror}") from None
    return all(re.search(rf'"{key}"\s*:', head) for key in layout.keys)


def data_set(layout: Layout, files: list[Path], limit: int, images: Path | None) -> DataSet:
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
    """The file's samples, each checked. Raises DataSetError."""
    samples, ids = layout.read(read_entries(file), file), set[str]()
    while True:
        try:
            sample = next(samples, None)
        except (KeyError, TypeError, ValueError, AttributeError) as reason:
            problem = f"it lacks {reason}" if isinstance(reason, KeyError) else str(reason)
            raise DataSetError(f"{file}: entry {len(ids) + 1} is no {layout.name} question: {problem}") from None
        if sample is None:
            return
        check(sample, file)
        if sample.id in ids:
            raise DataSetError(f"{file}: two questions have the id {sample.id!r:.60}; runs are compared by it")
        ids.add(sample.id)
        yield sample


def check(sample: Sample, file: Path) -> None:
    """Raises DataSetError when a sample lacks answers or holds other things than texts."""
    if not sample.answers:
        raise DataSetError(
            f"{file}: question {sample.id!r:.60} has no answers, so nothing can be judged (test splits lack them)"
        )
    if not all(isinstance(text, str) for text in (sample.image, sample.question, sample.kind, *sample.answers)):
        raise DataSetError(f"{file}: question {sample.id!r:.60}: image, question and answers should be texts")


def choose(whole: list[tuple[Sample, Path]], limit: int) -> list[tuple[Sample, Path]]:
    """`limit` of them (0: all), spread evenly by a digest of their ids, in their order."""
    if limit == 0 or limit >= len(whole):
        return whole
    spread = sorted(whole, key=lambda pair: hashlib.blake2b(pair[0].id.encode()).digest())
    ids = {id(pair) for pair in spread[:limit]}
    return [pair for pair in whole if id(pair) in ids]


def by_image(chosen: list[tuple[Sample, Path]]) -> list[tuple[Sample, Path]]:
    """Questions about one image next to each other, so that it is encoded once."""
    first: dict[Any, int] = {}
    for sample, _ in chosen:
        first.setdefault(sample.image, len(first))
    return sorted(chosen, key=lambda pair: first[pair[0].image])


def with_images(chosen: list[tuple[Sample, Path]], layout: Layout, images: Path | None) -> list[Sample]:
    """The samples with paths of images that are there. Raises DataSetError."""
    found = [(sample, find_image(str(sample.image), file, layout, images)) for sample, file in chosen]
    missing = [sample for sample, path in found if path is None]
    if missing:
        name = f"{missing[0].image!s:.200}"
        raise DataSetError(
            f"images of {len(missing)} of {len(found)} questions are missing, such as {name} beside "
            f"{chosen[0][1]}: put them there, or name their folder with --images"
        )
    return [dataclasses.replace(sample, image=path) for sample, path in found if path is not None]


def find_image(name: str, file: Path, layout: Layout, images: Path | None) -> Path | None:
    bases = [images] if images else []
    for folder in (file.parent, file.parent.parent):
        bases += [folder, *(folder / inner for inner in layout.image_folders)]
    places = (base / part for base in bases for part in dict.fromkeys((name, Path(name).name)))
    return next((place for place in places if is_file(place)), None)


def read_entries(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, of one under `data`, or of the lines of a file. Raises DataSetError."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataSetError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB: split it into several files")
        text = file.read_text(encoding="utf-8")
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise DataSetError(f"{file} holds more than {MAX_VALUES:,} values: split it into several files")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataSetError(f"{file} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    try:
        lines = file.suffix == ".jsonl"
        values = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise DataSetError(f"{file} is not valid JSON: {reason}") from None
    entries = values.get("data") if isinstance(values, dict) else values
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataSetError(f"{file} should hold a list of objects, bare or under 'data'")
    return entries
