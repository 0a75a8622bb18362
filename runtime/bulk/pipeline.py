"""From images to rows: each image gets the answers to some prompts, and a duplicate those of its twin."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...models.errors import FastVLMError, ImageError, PackageError, UsageError
from ...models.images import Fit, preprocess
from ..batch import BATCH_SIZE
from ..engine import PreparedRequest
from ..generate import Generation
from ..prompt_cache import ImageItem
from ..request import Request, opened, prepare
from ..timings import LapClock
from .answers import Answered, Asked, answers
from .sources import Item

if TYPE_CHECKING:
    from ..fastvlm import FastVLM

MAX_REMEMBERED = 2048
"""The images whose answers are remembered for duplicates. One takes a few kilobytes."""


@dataclass(frozen=True)
class Row:
    """The outcome of one image."""

    key: str
    image: Path | bytes | None
    """The file, or the bytes of the image. None if it could not be loaded."""
    answers: tuple[Generation, ...] = ()
    """One answer per prompt. Empty if there is an error."""
    error: str | None = None
    repeated: bool = False
    """True if the answers are those of an earlier image with the same bytes."""

    @property
    def entry(self) -> dict[str, Any]:
        """The content of the row as plain values. Several prompts have a list, in their order."""
        if self.error is not None:
            return {"error": self.error}
        answers = [entry_of(answer, timed=not self.repeated) for answer in self.answers]
        return answers[0] if len(answers) == 1 else {"answers": answers}


@dataclass(frozen=True)
class Loaded:
    """An image that was read, or could not be."""

    key: str
    image: Path | bytes | None
    digest: bytes = b""
    repeated: bool = False


class Captioner:
    """Answers prompts about a stream of images. It holds no more of them than are in work.

    Images with the same bytes as one of the last MAX_REMEMBERED get its answers, unless answers are sampled without a
    seed. The encoder then still sees them once, while its features are cached.

    Arguments: `options` are those of `prepare`. `batch_size` and `workers` are those of `answers`.

    Raises:
        UsageError: an option is out of range, or `prompts` is empty.
        PromptError: a prompt is not valid Unicode.
    """

    def __init__(
        self,
        model: FastVLM,
        prompts: str | Sequence[str],
        options: Mapping[str, Any] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
    ) -> None:
        self._engine = model.engine
        self._prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self._prompts:
            raise UsageError("prompts must have at least one prompt", "prompts")
        self._options = dict(options or {})
        self._asked = [with_image(prepare(None, prompt, **self._options)) for prompt in self._prompts]
        sampling = self._asked[0].options.sampling
        self._remembers = sampling.temperature == 0 or sampling.seed is not None
        self._known: OrderedDict[bytes, tuple[Generation, ...]] = OrderedDict()
        self._batch_size = batch_size
        self._workers = workers

    def rows(self, items: Iterable[Item]) -> Iterator[Row]:
        """Yields a row for each image, in their order.

        An image that cannot be opened or encoded gets a row with an error. Raises FastVLMError for anything else.
        """
        for answered in answers(self._engine, self.subjects(items), self._batch_size, self._workers):
            yield self._row(answered)

    def subjects(self, items: Iterable[Item]) -> Iterator[Callable[[], Asked[Loaded]]]:
        """Yields a function for each image, to be called in any thread, that decodes it and prepares its requests."""
        return (partial(self._asked_about, *loaded(item)) for item in items)

    def _asked_about(self, key: str, image: Path | bytes | ImageError) -> Asked[Loaded]:
        """Reads, decodes and scales an image. Runs in a thread."""
        count = len(self._prompts)
        if isinstance(image, ImageError):
            return Asked(Loaded(key, None), (image,) * count)
        digest = b""
        try:
            digest = bytes_digest(image) if self._remembers else b""
            if digest and (known := self._known.get(digest)) is not None:
                return Asked(Loaded(key, image, digest, repeated=True), known)
            return Asked(Loaded(key, image, digest), tuple(self._each(image)))
        except ImageError as reason:
            named = reason if isinstance(image, Path) else ImageError(str(reason).replace("the image", key, 1))
            return Asked(Loaded(key, image, digest), (named,) * count)

    def _each(self, image: Path | bytes) -> Iterator[PreparedRequest]:
        """Yields the requests of an image, which is scaled once and not kept in its full size."""
        clock = LapClock()
        (decoded,) = opened(image, self._options.get("background", "white"))
        open_ms = clock.lap_ms()
        size, fit = self._engine.encoder.image_size, self._asked[0].fit or self._engine.config.image_aspect_ratio
        pixels = ImageItem(preprocess(decoded, size, cast("Fit", fit)))
        scale_ms = clock.lap_ms()
        for asked in self._asked:
            ready = self._engine.prepare(replace(asked, image_open_ms=open_ms), [pixels])
            yield replace(ready, preprocess_ms=ready.preprocess_ms + scale_ms)

    def _row(self, answered: Answered[Loaded]) -> Row:
        """Returns the row of an image whose prompts are answered. Raises an error that is not about the image."""
        image = answered.subject
        for outcome in answered.outcomes:
            if isinstance(outcome, ImageError | PackageError):
                return Row(image.key, image.image, error=str(outcome))
            if isinstance(outcome, FastVLMError):
                raise outcome
        found = tuple(outcome for outcome in answered.outcomes if isinstance(outcome, Generation))
        if image.digest:
            self._known[image.digest] = found
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return Row(image.key, image.image, found, repeated=image.repeated)


def with_image(request: Request) -> Request:
    """Returns a request without images with a place for one before its question, or at the mark in it."""
    messages = (replace(message, image_count=int(message.role == "user")) for message in request.messages)
    return replace(request, messages=tuple(messages))


def loaded(item: Item) -> tuple[str, Path | bytes | ImageError]:
    """Returns the key of an item, and its image or the error of loading it."""
    try:
        return item.key, item.load()
    except ImageError as reason:
        return item.key, reason


def bytes_digest(image: Path | bytes) -> bytes:
    """Returns a digest of an image's bytes, or an empty one if it is not a readable file."""
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    try:
        if not image.is_file():
            return b""
        with image.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return b""


def entry_of(answer: Generation, timed: bool = True) -> dict[str, Any]:
    """Returns an answer as plain values. An answer of several fields has them under `answer`."""
    entry: dict[str, Any] = {
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }
    try:
        content = answer.parsed
    except UsageError as reason:  # the validators of a Pydantic model refuse it
        content, entry["answer_error"] = None, str(reason)
    if content is not None:
        entry["answer"] = content.model_dump(mode="json") if hasattr(content, "model_dump") else content
    return {**entry, "timings": answer.timings.as_dict()} if timed else entry
