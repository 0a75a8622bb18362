"""Everything up to the first token of an answer, stage by stage. What was read before is not read again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from ..models._mlx import mx, on_cpu
from ..models.config import FastVLMConfig
from ..models.errors import PromptError, WeightsError
from ..models.images import Fit, preprocess, to_pixel_values
from ..models.kv_cache import KVCache
from ..models.language import LanguageSide
from ..models.tokenizer_files import IMAGE_TOKEN
from .encoders import PendingFeatures, SeparateEncoder, VisionEncoder
from .feature_cache import FeatureCache
from .generate import prefill
from .prompt import Message, Prompt, PromptEncoder
from .request import Request
from .reuse import MAX_PREFIX, Cell, Memory, Picture, Prefixes, cells_of, evaluated, lead_of, position_count, segments
from .sampling import Sampler
from .timings import LapClock

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHE_ROOM = 512
"""Positions for the answer that are allocated ahead, however large max_tokens is."""


AHEAD = 2
"""Requests whose images are encoded before they begin: enough to keep the encoder busy, in bounded memory."""


@dataclass(frozen=True)
class Start:
    """An answer of which the first token is known."""

    first: mx.array
    """Its id (1,), evaluated."""
    cache: list[KVCache]
    cells: tuple[Cell, ...]
    """Of the whole prompt: the cache holds them."""
    sampler: Sampler
    room: int
    """Tokens that the answer may have."""
    prompt_tokens: int
    reused_tokens: int
    cached_images: int
    stages_ms: dict[str, float]


@dataclass(eq=False)
class Prepared:
    """A request whose images have been made ready for the encoder, or are on their way through it."""

    request: Request
    pictures: tuple[Picture, ...]
    preprocess_ms: float
    submitted: list[tuple[Picture, PendingFeatures]] = field(default_factory=list)

    @property
    def is_encoded(self) -> bool:
        """Whether nothing of it is on its way through the encoder."""
        return all(pending.done for _, pending in self.submitted)


class Starter:
    """Takes requests up to their first token.

    Attributes:
        ahead: requests that may wait with their images on the way through the encoder; 0 where it has no process.
        kv_bits: None, or 8: see `Qwen2.make_cache`.
    """

    def __init__(
        self,
        config: FastVLMConfig,
        encoder: VisionEncoder,
        language: LanguageSide,
        prompts: PromptEncoder,
        kv_bits: int | None = None,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.language = language
        self.prompts = prompts
        self.kv_bits = kv_bits
        self.ahead = AHEAD if isinstance(encoder, SeparateEncoder) else 0
        self._prepared: weakref.WeakSet[Prepared] = weakref.WeakSet()
        self.feature_cache = FeatureCache()
        self.prefixes = Prefixes()
        language.language_model.make_cache(0, kv_bits)  # tells now what is wrong with kv_bits

    def warm(self) -> None:
        """Reads what the chat template writes in front of every image, and remembers it.

        A template that cannot take a plain question is left to the first request, which tells why.
        """
        try:
            prompt = self.prompts.encode([Message("user", "", 1)])
        except PromptError:
            return
        lead = lead_of(cells_of(prompt, [Picture(np.empty(0, np.uint8))] * prompt.image_count))
        if 0 < len(lead) <= min(MAX_PREFIX, self.config.max_context) and max(lead) < self.language.vocabulary_rows:
            self._read_lead(lead, 0, [], pinned=True)

    def prepare(self, request: Request) -> Prepared:
        """The request with its images as squares; needs no turn."""
        clock = LapClock()
        size, fit = self.encoder.image_size, request.fit or cast("Fit", self.config.image_aspect_ratio)
        pictures = tuple(Picture(preprocess(image, size, fit)) for image in request.images)
        prepared = Prepared(request, pictures, clock.lap_ms())
        self._prepared.add(prepared)
        return prepared

    def submit(self, prepared: Prepared, pictures: Iterable[Picture] | None = None) -> None:
        """Gives images of a request, by default all, to the encoder's process while it has room; needs no turn.

        What is remembered, or on its way for another request, is left out. Raises MachineError.
        """
        if not isinstance(self.encoder, SeparateEncoder):
            return
        for picture in prepared.pictures if pictures is None else pictures:
            if self.encoder.room == 0 or len(prepared.submitted) == AHEAD:
                return
            if not self.feature_cache.holds(picture.pixels) and not self._on_their_way(picture):
                pending = self.encoder.submit(to_pixel_values(picture.pixels))
                prepared.submitted.append((picture, pending))

    def _on_their_way(self, picture: Picture) -> list[Prepared]:
        """Requests for which an image has been given to the encoder."""
        return [
            prepared for prepared in list(self._prepared) if any(picture == other for other, _ in prepared.submitted)
        ]

    def start(self, asked: Request | Prepared, memory: Memory, pictures: Sequence[Picture] = ()) -> Start:
        """The first token of the answer to a request, which may have been prepared.

        `memory` is what may be reused and is replaced by what has been read; it is empty after an error.
        `pictures` are the images of earlier messages; those of the request follow them.

        Raises:
            PromptError: the prompt does not fit the images, the context or the model.
            PackageError: the encoder cannot run.
            WeightsError: the logits are not finite.
        """
        clock, stages_ms = LapClock(), {}
        before = asked if isinstance(asked, Prepared) else None
        request = asked.request if isinstance(asked, Prepared) else asked
        prompt = self.prompts.encode(request.messages)
        length = self._checked_length(prompt, len(pictures) + len(request.images))
        prepared = before or self.prepare(request)
        cells = cells_of(prompt, [*pictures, *prepared.pictures])
        stages_ms["preprocess_ms"] = clock.lap_ms() + (before.preprocess_ms if before else 0.0)
        hits = self.feature_cache.hits
        held, cache = self._recall(cells, memory)
        reused_tokens = position_count(cells[:held], self.config.tokens_per_image)
        lead = fixed_lead(request.messages, cells)
        image_features, held, cache = self._encoded(prepared, cells, lead, held, cache)
        stages_ms["encode_ms"] = clock.lap_ms()
        projected = self._project(image_features)
        stages_ms["project_ms"] = clock.lap_ms()
        room = min(request.options.max_tokens, self.config.max_context - length)
        if held < len(lead):
            held, cache = len(lead), self._read_lead(lead, held, cache)
        cache = cache or self._empty(0)
        logits = self._prefill(cells[held:], cache, projected, length + min(room, CACHE_ROOM))
        if on_cpu():
            _check_finite(logits)
            stages_ms["prefill_ms"] = clock.lap_ms()
        sampler = Sampler(request.options.sampling, prompt.ids)
        first = sampler(logits[0])
        if on_cpu():
            mx.eval(first, *sampler.state)
        else:  # one wait for both: sampling takes no time there
            _check_finite(logits, first, *sampler.state)
            stages_ms["prefill_ms"] = clock.lap_ms()
        stages_ms["sample_ms"] = clock.lap_ms()
        memory.put(cells, cache)
        cached_images = self.feature_cache.hits - hits
        return Start(first, cache, cells, sampler, room, length, reused_tokens, cached_images, stages_ms)

    def _checked_length(self, prompt: Prompt, image_count: int) -> int:
        """Positions that the prompt takes. Raises PromptError unless it fits the images, the context and the model."""
        if prompt.image_count != image_count:
            raise PromptError(f"the prompt has places for {prompt.image_count} images, but {image_count} came with it")
        length = prompt.token_count(self.config.tokens_per_image)
        if length == 0:
            raise PromptError("the prompt is empty, and the model's chat template adds nothing to it")
        if length >= self.config.max_context:
            images = f" ({self.config.tokens_per_image} for each image)" if image_count else ""
            room = f"{self.config.max_context:,}"
            raise PromptError(
                f"the prompt takes {length:,} tokens{images}, and the context holds {room} with the answer: shorten "
                "it, or begin a conversation anew"
            )
        highest = max((i for i in prompt.ids if i != prompt.image_token_index), default=0)
        rows = self.language.vocabulary_rows
        if highest >= rows:
            raise PromptError(f"the prompt has the token {highest}, and the model has embeddings for {rows}")
        return length

    def _recall(self, cells: Sequence[Cell], memory: Memory) -> tuple[int, list[KVCache]]:
        """How many of `cells` were read before, and a cache that holds them: of this conversation, or of any prompt."""
        own, cache = memory.take(cells, self.config.tokens_per_image)
        held, prefix = self.prefixes.longest(cells)
        return (own, cache) if own >= held else (held, prefix)

    def _encoded(
        self, prepared: Prepared, cells: Sequence[Cell], lead: Sequence[int], held: int, cache: list[KVCache]
    ) -> tuple[list[NDArray[np.float32]], int, list[KVCache]]:
        """`image_features` (1, N, C) of the images not held yet. Text before them may be read meanwhile."""
        wanted = [cell for cell in cells[held:] if isinstance(cell, Picture)]
        if self.ahead and held < len(lead):
            self.submit(prepared, wanted)
            held, cache = len(lead), self._read_lead(lead, held, cache)
        return [self._features(picture) for picture in wanted], held, cache

    def _features(self, picture: Picture) -> NDArray[np.float32]:
        """`image_features` (1, N, C) of a square, encoded unless they are remembered."""
        features = self.feature_cache.get(picture.pixels)
        if features is None:
            for prepared in self._on_their_way(picture):
                found = next(item for item in prepared.submitted if item[0] == picture)
                prepared.submitted.remove(found)
                features = found[1].result()
                break
            else:
                features = self.encoder.encode(to_pixel_values(picture.pixels))
            self.feature_cache.put(picture.pixels, features)
        return features

    def _project(self, image_features: list[NDArray[np.float32]]) -> list[mx.array]:
        """What stands in for each image's tokens, (1, N, D); nothing to compute where the package projects."""
        projector = self.language.multi_modal_projector
        if self.encoder.projected:
            projected = [mx.array(features).astype(projector.linear_2.bias.dtype) for features in image_features]
        else:
            projected = [projector(mx.array(features)) for features in image_features]
        mx.eval(projected)
        return projected

    def _prefill(
        self, cells: Sequence[Cell], cache: list[KVCache], projected: list[mx.array], capacity: int
    ) -> mx.array:
        """Reads `cells` into a cache that gets room for `capacity` positions; logits (1, V), not yet computed."""
        for layer in cache:
            layer.reserve(capacity)
        return prefill(self.language.language_model, self._embed(cells, projected), cache)

    def _read_lead(self, lead: Sequence[Cell], held: int, cache: list[KVCache], pinned: bool = False) -> list[KVCache]:
        """A cache of the text `lead`, of which `cache` holds the first cells; it is remembered for other prompts."""
        cache = [layer.fork(len(lead)) for layer in cache] if cache else self._empty(len(lead))
        self.language.language_model.extend(self._embed(lead[held:], []), cache)
        evaluated(cache)
        self.prefixes.add(lead, cache, pinned)
        return [layer.fork() for layer in cache]

    def _empty(self, capacity: int) -> list[KVCache]:
        return self.language.language_model.make_cache(capacity, self.kv_bits)

    def _embed(self, cells: Sequence[Cell], projected: Sequence[mx.array]) -> mx.array:
        """`inputs_embeds` (1, L, D): the text's embeddings, with each image's features in its place."""
        images = iter(projected)
        decoder = self.language.language_model
        parts = [
            next(images) if isinstance(segment, Picture) else decoder.embed(mx.array([segment]))
            for segment in segments(cells)
        ]
        return mx.concatenate(parts, axis=1)  # (1, L, D)


def fixed_lead(messages: Sequence[Message], cells: Sequence[Cell]) -> list[int]:
    """What stands in front of the first image, where that is the template's and the system prompt's; else nothing.

    Where a user wrote it, it will not come again: to read it apart would cost a pass over the weights.
    """
    asked = next((message for message in messages if message.role == "user"), None)
    if asked is None or not asked.image_count:
        return []
    lead = lead_of(cells) if IMAGE_TOKEN not in asked.content or asked.content.startswith(IMAGE_TOKEN) else []
    return lead if len(lead) <= MAX_PREFIX else []


def _check_finite(logits: mx.array, *others: mx.array) -> None:
    """Computes the logits and `others` together. Raises WeightsError where the logits are NaN or infinite."""
    finite = mx.isfinite(logits).all()
    mx.eval(logits, finite, *others)
    if not finite.item():
        raise WeightsError(
            "the decoder gives logits that are not finite: its weights are damaged, or overflow "
            f"{str(logits.dtype).removeprefix('mlx.core.')}; export the model again"
        )
