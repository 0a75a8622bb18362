"""The images per second of bulk captions, of the whole pipeline and of each of its stages alone.

`fastvlm bench --captions --report` writes one object (`schema` "fastvlm.captions-benchmark/1"):

    schema          "fastvlm.captions-benchmark/1"
    fastvlm         the version
    configurations  one per folder: label, images, runs, prompt, max_tokens, batch_size, workers, encoder,
                    decoder_device, tokens_per_image (the mean length of an answer), images_per_second {stage: rate},
                    pipeline and one_after_the_other (images per second), limited_by (a stage), share (of its rate)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

from ..._version import __version__
from ...models.ahead import Ahead, default_workers
from ...models.errors import ImageError
from ...models.images import to_pixel_values
from ..batch import BATCH_SIZE, Batch
from ..bulk.answers import Asked
from ..bulk.pipeline import Captioner, Loaded
from ..bulk.sources import Item
from ..encoders import SeparateEncoder
from ..engine import Engine, PreparedRequest
from ..fastvlm import FastVLM
from ..generate import Generation
from ..prompt_cache import FeatureCache, ImageItem

SCHEMA = "fastvlm.captions-benchmark/1"

MAX_IMAGES = 64
"""The most images that are measured. Their pixels and features stay in memory, up to 6 MB per image at 1024 px."""

QUEUED = 2
"""The images that an encoder process has at a time when it is measured alone: one is encoded, and one waits."""


@dataclass(frozen=True)
class CaptionRates:
    """The images per second of a folder, each the median of `runs` passes over the images."""

    label: str
    images: int
    runs: int
    prompt: str
    max_tokens: int
    tokens_per_image: float
    """The mean length of an answer."""
    workers: int
    """The threads that decode images."""
    encoder: str
    """The backend of the encoder, with `process` if it has one of its own."""
    decoder_device: str
    decode: float
    """Opening and scaling of images, in threads."""
    encode: float
    """The vision encoder."""
    answer: float
    """The language decoder: prompts and answers in batches, about images that are encoded already."""
    pipeline: float
    """All of them, as in `fastvlm caption`."""
    notes: tuple[str, ...] = ()

    @property
    def stages(self) -> dict[str, float]:
        """The images per second of each stage alone."""
        return {"decode": self.decode, "encode": self.encode, "answer": self.answer}

    @property
    def limited_by(self) -> str:
        """The slowest stage."""
        return min(self.stages, key=self.stages.__getitem__)

    @property
    def share(self) -> float:
        """The pipeline's rate as a share of the slowest stage's."""
        return self.pipeline / self.stages[self.limited_by]

    @property
    def one_after_the_other(self) -> float:
        """The images per second if no two stages overlapped."""
        return 1 / sum(1 / rate for rate in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns an entry of `configurations`, as described at the top of this file."""
        return {
            "label": self.label,
            "images": self.images,
            "runs": self.runs,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "batch_size": BATCH_SIZE,
            "workers": self.workers,
            "encoder": self.encoder,
            "decoder_device": self.decoder_device,
            "tokens_per_image": round(self.tokens_per_image, 2),
            "images_per_second": {stage: round(rate, 4) for stage, rate in self.stages.items()},
            "pipeline": round(self.pipeline, 4),
            "one_after_the_other": round(self.one_after_the_other, 4),
            "limited_by": self.limited_by,
            "share": round(self.share, 3),
        }


def report_of(found: Sequence[CaptionRates]) -> dict[str, Any]:
    """Returns the report described at the top of this file."""
    return {"schema": SCHEMA, "fastvlm": __version__, "configurations": [one.as_dict() for one in found]}


def table(found: CaptionRates) -> Iterator[str]:
    """Yields the lines of a folder's table."""
    yield (
        f"{found.label}: {found.images} images, {found.tokens_per_image:.1f} tokens per image, "
        f"batches of {BATCH_SIZE}, encoder {found.encoder}, decoder on {found.decoder_device}"
    )
    yield f"{'':<32}images/s"
    names = {
        "decode": f"decode images ({found.workers} threads)",
        "encode": "encode images",
        "answer": "answer",
    }
    for stage, rate in found.stages.items():
        yield f"{names[stage]:<30}{rate:>10.2f}{'  the slowest stage' if stage == found.limited_by else ''}"
    yield f"{'one after the other':<30}{found.one_after_the_other:>10.2f}"
    yield f"{'pipeline':<30}{found.pipeline:>10.2f}  {found.share:.2f} of the slowest stage"


class CaptionBench:
    """The measurements of one model over the first MAX_IMAGES different images that can be opened.

    Raises:
        ImageError: none of the images can be opened.
    """

    def __init__(self, model: FastVLM, items: Iterable[Item], prompt: str, max_tokens: int) -> None:
        self._model, self._engine = model, model.engine
        self._prompt, self._options = prompt, {"max_tokens": max_tokens}
        self._workers = default_workers()
        self._items, self._requests = self._chosen(items)
        self._features: dict[bytes, Any] = {}
        self._tokens: list[int] = []

    def measured(self, label: str, runs: int, on_stage: Callable[[str], None] = lambda _: None) -> CaptionRates:
        """Returns the rates, with a warm-up pass before the measured ones. `on_stage` is called with each pass."""
        from ...models._mlx import mx  # a bad option fails before this import

        stages = {"decode": self._decode, "encode": self._encode, "answer": self._answer, "pipeline": self._pipeline}
        self._encode()
        self._pipeline()
        seconds: dict[str, list[float]] = {stage: [] for stage in stages}
        for run in range(runs):
            on_stage(f"{label} ({run + 1} of {runs})")
            for stage, work in stages.items():
                self._engine.clear_caches()
                start = time.perf_counter()
                work()
                seconds[stage].append(time.perf_counter() - start)
        process = " process" if isinstance(self._engine.encoder, SeparateEncoder) else ""
        return CaptionRates(
            label=label,
            images=len(self._items),
            runs=runs,
            prompt=self._prompt,
            max_tokens=self._options["max_tokens"],
            tokens_per_image=fmean(self._tokens),
            workers=self._workers,
            encoder=self._engine.encoder.name + process,
            decoder_device="GPU" if mx.default_device() == mx.gpu else "CPU",
            notes=self._model.notes,
            **{stage: len(self._items) / median(found) for stage, found in seconds.items()},
        )

    def _chosen(self, items: Iterable[Item]) -> tuple[list[Item], list[PreparedRequest]]:
        """Returns different images that can be opened, with their requests."""
        chosen: dict[bytes, tuple[Item, PreparedRequest]] = {}
        reason: Any = "there is none"
        with Ahead(self._captioner().subjects(items), self._workers) as ahead:
            for asked in ahead:
                (request,) = asked.requests
                image = asked.subject.image
                if isinstance(request, PreparedRequest) and image is not None:
                    kept = Item(asked.subject.key, lambda image=image: image)  # type: ignore[misc]
                    chosen.setdefault(asked.subject.digest, (kept, request))
                else:
                    reason = request
                if len(chosen) == MAX_IMAGES:
                    break
        if not chosen:
            raise ImageError(f"no image can be opened: {reason}")
        return [item for item, _ in chosen.values()], [request for _, request in chosen.values()]

    def _captioner(self) -> Captioner:
        return Captioner(self._model, self._prompt, self._options, workers=self._workers)

    def _decode(self) -> None:
        with Ahead(self._captioner().subjects(self._items), self._workers) as ahead:
            done: list[Asked[Loaded]] = list(islice(ahead, len(self._items)))
        assert len(done) == len(self._items)

    def _encode(self) -> None:
        images = [item for request in self._requests for item in request.items if isinstance(item, ImageItem)]
        for image, features in zip(images, encoded(self._engine, images), strict=True):
            self._features[image.digest] = features

    def _answer(self) -> None:
        """Answers with the features of all images in the cache."""
        usual = self._engine.feature_cache
        known = FeatureCache(sum(features.nbytes for features in self._features.values()))
        for request in self._requests:
            request.submitted.clear()
            for item in request.items:
                if isinstance(item, ImageItem):
                    known.put(item, self._features[item.digest])
        self._engine.feature_cache = known
        try:
            found = list(Batch(self._engine, BATCH_SIZE).outcomes(self._requests))
        finally:
            self._engine.feature_cache = usual
        self._tokens = [len(one.token_ids) for one in checked(found)]

    def _pipeline(self) -> None:
        for row in self._captioner().rows(self._items):
            if row.error is not None:
                raise ImageError(row.error)


def encoded(engine: Engine, images: Iterable[ImageItem]) -> Iterator[Any]:
    """Yields the features of images, with a queue before an encoder process."""
    encoder = engine.encoder
    if not isinstance(encoder, SeparateEncoder):
        for image in images:
            yield encoder.encode(to_pixel_values(image.pixels))
        return
    pending: deque[Any] = deque()
    for image in images:
        pending.append(encoder.submit(to_pixel_values(image.pixels)))
        if len(pending) > QUEUED:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def checked(outcomes: Iterable[Any]) -> list[Generation]:
    """Returns outcomes that are all answers. Raises the first error."""
    found: list[Generation] = []
    for outcome in outcomes:
        if not isinstance(outcome, Generation):
            raise outcome
        found.append(outcome)
    return found
