"""Captions for Ray Data, as `fastvlm.ray`: a class for `Dataset.map_batches`, whose actors load the model once.

    >>> import fastvlm, ray
    >>> images = ray.data.read_binary_files("photos/", include_paths=True)
    >>> images.map_batches(fastvlm.ray.Captioner, fn_constructor_args=("model",), batch_size=32, num_cpus=1,
    ...                    compute=ray.data.ActorPoolStrategy(size=2)).write_parquet("captions")

This module does not import Ray, so the class can be tried on a batch without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import ImageError, UsageError
from ..batch import BATCH_SIZE
from ..fastvlm import load as load_model
from . import pipeline
from .sources import Item

IMAGE_COLUMNS = ("bytes", "image", "path")
"""The columns that are searched for images, in this order. `read_binary_files` calls them `bytes` and `path`."""

KEY_COLUMNS = ("key", "path")
"""The columns by which errors name an image, in this order."""


class Captioner:
    """Captions batches of Ray Data: `dataset.map_batches(fastvlm.ray.Captioner, fn_constructor_args=("model",))`.

    A batch is a dict of arrays. The images are in the column `bytes` (encoded images), `image` (the structs of
    `datasets`) or `path`, or in `column`. The result has the columns of the batch, without the images' bytes unless
    `keep_images`, and `text`, `tokens`, `finish_reason` and `error`. Several prompts have `text_1`, `text_2` and so on.
    A structured answer is JSON in `answer`. An image that cannot be opened has its `error`, an empty text and 0 tokens.
    Others have an empty `error`: a column of nulls would give the files that Ray Data writes different schemas.

    Args:
        model: an exported folder, at the same path on every machine, or the hub id of one.
        prompts: one question per image, or several.
        options: the options of `generate`, such as `max_tokens`.
        column: the column with the images.
        keep_images: keep the bytes of the images in the result.
        batch_size: the number of answers that are decoded together. The batches of Ray Data should be larger.
        workers: the threads that decode images, at most as many as the actor has cores.
        load: the arguments of `fastvlm.load`, such as `backend`.

    Raises:
        UsageError: an option is out of range, or a batch has no images.
        FastVLMError: the model cannot be loaded, or any error that is not about one image.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str] = "Describe the image.",
        options: Mapping[str, Any] | None = None,
        *,
        column: str | None = None,
        keep_images: bool = False,
        batch_size: int = BATCH_SIZE,
        workers: int = 1,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        self._prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._structured = (options or {}).get("schema") is not None
        self._column, self._keep_images = column, keep_images
        loaded = load_model(model, **(load or {}))
        self._captioner = pipeline.Captioner(loaded, self._prompts, options, batch_size=batch_size, workers=workers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch with the answers of its images, in the order of its rows."""
        column = image_column(batch, self._column)
        images, keys = batch[column], keys_of(batch)
        items = [Item(key, loader(image, key)) for key, image in zip(keys, images, strict=True)]
        answers = [self._cells(row.entry) for row in self._captioner.rows(items)]
        kept = {name: batch[name] for name in batch if self._keep_images or name != column or is_text(images)}
        return {**kept, **{name: object_array([row[name] for row in answers]) for name in self._names()}}

    def _names(self) -> list[str]:
        ends = [""] if len(self._prompts) == 1 else [f"_{number}" for number in range(1, len(self._prompts) + 1)]
        return [*(name + end for end in ends for name in self._fields()), "error"]

    def _fields(self) -> tuple[str, ...]:
        return ("text", "tokens", "finish_reason", *(("answer",) if self._structured else ()))

    def _cells(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the new cells of a row. Each has a value, so the schema does not depend on the batch."""
        answers = [{}] * len(self._prompts) if "error" in entry else entry.get("answers", [entry])
        values = [cell(answer.get(name), name) for answer in answers for name in self._fields()]
        return dict(zip(self._names(), [*values, entry.get("error", "")], strict=True))


def cell(value: Any, name: str) -> Any:
    """Returns the value of a column, of one type for every row. That of `answer` is JSON."""
    if value is None:
        return 0 if name == "tokens" else ""
    return json.dumps(value, ensure_ascii=False) if name == "answer" else value


def image_column(batch: Mapping[str, Any], column: str | None = None) -> str:
    """Returns the column of a batch that has the images. Raises UsageError if there is none."""
    if not isinstance(batch, dict):
        raise UsageError(f"a batch must be a dict of arrays (got {type(batch).__name__}). Use batch_format='numpy'.")
    found = next((name for name in ((column,) if column else IMAGE_COLUMNS) if name in batch), None)
    if found is None:
        wanted = column or " or ".join(IMAGE_COLUMNS)
        raise UsageError(f"a batch must have the column {wanted} (got {', '.join(batch)}). Pass column.", "column")
    return found


def keys_of(batch: Mapping[str, Any]) -> list[str]:
    """Returns the names of the images of a batch: their keys, paths or numbers."""
    count = len(next(iter(batch.values())))
    named = next((batch[name] for name in KEY_COLUMNS if name in batch), range(count))
    return [str(name) for name in named]


def is_text(images: Any) -> bool:
    """Returns whether the images of a batch are paths, which are small enough to be kept."""
    return all(isinstance(image, str) for image in images)


def loader(image: Any, key: str) -> Callable[[], Path | bytes]:
    """Returns the loader of a cell: encoded bytes, a path, or a struct of both as `datasets` writes it."""

    def load() -> Path | bytes:
        content = image
        if isinstance(image, dict):
            content = image.get("bytes") or image.get("path")
        if isinstance(content, bytes | bytearray | memoryview):
            return bytes(content)
        if isinstance(content, str):
            return Path(content)
        kind = type(content).__name__
        raise ImageError(f"{key} must be encoded bytes or a path (got {kind}). Read it with read_binary_files.")

    return load


def object_array(values: Sequence[Any]) -> np.ndarray:
    """Returns values as an array of objects, in which None is a missing value."""
    array = np.empty(len(values), object)
    array[:] = values
    return array
