"""The engine behind `FastVLM`, batches and chats: from a request to token ids, stage by stage, under one lock."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
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
from .beam_search import BeamSearch, best_ids
from .encoders import PendingFeatures, SeparateEncoder, VisionEncoder
from .generate import PREFILL_CHUNK, DecodeResult, Generation, Stream, decode, prefill, read_answer
from .mlx_device import DeviceMemory, SharedStream
from .prompt import Message, Prompt, PromptEncoder
from .prompt_cache import (
    FEATURE_SHARE,
    MAX_PREFIX_TOKENS,
    CachedPrompt,
    FeatureCache,
    ImageItem,
    PrefixCache,
    PromptItem,
    default_cache_bytes,
    evaluate,
    image_count,
    position_count,
    prompt_items,
    segments,
    text_prefix,
)
from .request import Request
from .sampling import Sampler, id_on_host
from .structured import AllowedTokens, Vocabulary
from .timings import LapClock, Timings
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANSWER_CAPACITY = 512
"""Cache positions that are allocated ahead for an answer, however large max_tokens is."""

ENCODE_AHEAD = 2
"""Requests whose images are encoded before their prefill. Two keep the encoder busy in bounded memory."""

_answers = itertools.count()
"""Answers of this process, to tell a cold one from a warm one."""


@dataclass(frozen=True)
class PrefillResult:
    """A prompt that is in the cache, with the first token of its answer."""

    first_token: mx.array
    """The first id (1,), evaluated."""
    logits: mx.array | None
    """The logits (1, V) that it came from, kept for beam search."""
    cache: list[KVCache]
    items: tuple[PromptItem, ...]
    """The items of the whole prompt, which the cache holds."""
    sampler: Sampler
    max_new_tokens: int
    """The limit of the answer: max_tokens, or what the context has left."""
    prompt_tokens: int
    reused_tokens: int
    cached_images: int
    stages_ms: dict[str, float]
    cold: bool
    """True for the first answer of this process."""


@dataclass(eq=False)
class PreparedRequest:
    """A request whose prompt is encoded and whose images are preprocessed, and perhaps in the encoder process."""

    request: Request
    items: tuple[PromptItem, ...]
    """The items of the whole prompt, with the images of earlier messages."""
    prompt_ids: tuple[int, ...]
    prompt_tokens: int
    """The positions of the prompt."""
    preprocess_ms: float
    allowed: AllowedTokens | None = None
    """The tokens that its constraint allows next."""
    submitted: list[PendingFeatures] = field(default_factory=list)

    @property
    def is_encoded(self) -> bool:
        """True if the encoder has finished all images that were submitted for the request."""
        return all(pending.done for pending in self.submitted)


class Engine:
    """The parts of a loaded model, and the only code that computes with them.

    Attributes:
        lock: held by the thread that computes, inside the context `mlx_stream()`.
        encode_ahead_limit: number of requests whose images may be encoded before their prefill. It is 0 if the
            encoder runs in this process.
        kv_bits: None, or 8 for keys and values in 8 bits (see `Qwen2.make_cache`).
        feature_cache, prefix_cache: what earlier prompts left for later ones, within `cache_bytes` together.
        load_ms: time to load the model, without the first-use compilation of the package.
        vocabulary: the tokens, for answers with a constraint.
        memory: keeps the weights wired on a GPU while answers are computed.
    """

    def __init__(
        self,
        config: FastVLMConfig,
        encoder: VisionEncoder,
        language: LanguageSide,
        tokenizer: Tokenizer,
        prompts: PromptEncoder,
        kv_bits: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.language = language
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.kv_bits = kv_bits
        self.load_ms = 0.0
        self.memory = DeviceMemory(language)
        self.encode_ahead_limit = ENCODE_AHEAD if isinstance(encoder, SeparateEncoder) else 0
        total = default_cache_bytes() if cache_bytes is None else cache_bytes
        self.feature_cache = FeatureCache(int(FEATURE_SHARE * total))
        self.prefix_cache = PrefixCache(total - self.feature_cache.max_bytes, config.tokens_per_image)
        self.lock = threading.Lock()
        self.mlx_stream = SharedStream()
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        end = () if prompts.turn_end_id is None else (prompts.turn_end_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*config.eos_token_ids, *own, *end)))
        self._pending: weakref.WeakValueDictionary[bytes, PendingFeatures] = weakref.WeakValueDictionary()
        """The images in the encoder process by digest. The requests that submitted them own the pending features."""
        self.vocabulary = Vocabulary(tokenizer, language.vocabulary_rows, self.eos_token_ids)
        language.language_model.make_cache(0, kv_bits)  # raises now if kv_bits does not fit the model

    def warm_up(self) -> None:
        """Computes the prefix that the chat template writes before every image, and pins it in the cache.

        A template that cannot render a plain question is left to the first request, whose error has the reason.
        """
        try:
            prompt = self.prompts.encode([Message("user", "", 1)])
        except PromptError:
            return
        prefix = text_prefix(prompt_items(prompt, [ImageItem(np.empty(0, np.uint8))] * prompt.image_count))
        fits = len(prefix) <= min(MAX_PREFIX_TOKENS, self.config.max_context)
        if prefix and fits and max(prefix) < self.language.vocabulary_rows:
            with self.lock, self.mlx_stream():
                self._extend_prefix(prefix, 0, [], pinned=True)

    def stream(self, request: Request) -> Stream:
        """Returns the answer to a request as a stream of text."""
        return Stream(self._answer_once(request))

    def _answer_once(self, request: Request) -> Generator[str, None, Generation]:
        """Yields the text of an answer, and keeps its cache for later prompts."""
        cached = CachedPrompt()
        generation = yield from self.answer(request, cached)
        with self.lock, self.mlx_stream():
            self.keep(cached)
        return generation

    def keep(self, cached: CachedPrompt) -> None:
        """Stores the content of a cache for later prompts. Needs the lock."""
        items = cached.computed(self.config.tokens_per_image)
        length = position_count(items, self.config.tokens_per_image)
        compact = [layer.compact(length) for layer in cached.cache]
        if compact:
            evaluate(compact)
            self.prefix_cache.add(items, compact)

    def clear_caches(self) -> None:
        """Drops what earlier prompts left, so that the next answer shows its full time to first token."""
        self.feature_cache.clear()
        self.prefix_cache.clear()

    def answer(
        self, request: Request, cached: CachedPrompt, images: Sequence[ImageItem] = ()
    ) -> Generator[str, None, Generation]:
        """Yields the text of an answer as it is decoded, and returns the whole of it. See `prefill`."""
        with self.memory.in_use():
            prefilled = self.prefill(request, cached, images)
            token_ids, options = self.token_ids(request, prefilled, cached), request.options
            decoded = yield from read_answer(
                token_ids, self.tokenizer, self.stop_ids(request), options.stop, at_once=options.beams.num_beams > 1
            )
        return self.generation(request, prefilled, decoded)

    def stop_ids(self, request: Request) -> tuple[int, ...]:
        """The ids that end the answer to a request. A constraint's end is an end whatever `ignore_eos` says."""
        options = request.options
        return () if options.ignore_eos and options.constraint is None else self.eos_token_ids

    def token_ids(self, request: Request, prefilled: PrefillResult, cached: CachedPrompt) -> Iterator[int]:
        """Yields the ids of an answer and records each in `cached`. An error clears `cached`."""
        rest = self.decoded_ids(request, prefilled)
        while True:
            try:
                with self.lock, self.mlx_stream():
                    token_id = next(rest, -1)
            except BaseException:
                cached.clear()
                raise
            if token_id == -1:
                return
            if token_id is not None:
                cached.items.append(token_id)
                yield token_id

    def decoded_ids(self, request: Request, prefilled: PrefillResult) -> Iterator[int | None]:
        """Yields the ids of an answer, and None where others may compute first. Each `next` needs the lock."""
        decoder, first, count = self.language.language_model, prefilled.first_token, prefilled.max_new_tokens
        if prefilled.logits is None:
            yield id_on_host(first)
            yield from decode(decoder, first, prefilled.cache, prefilled.sampler, count - 1)
            return
        search = BeamSearch(request.options.beams, self.stop_ids(request), count)
        penalty, prompt_ids = request.options.sampling.repetition_penalty, prefilled.sampler.prompt_ids
        yield from best_ids(decoder, prefilled.logits, prefilled.cache, search, penalty, prompt_ids)

    def generation(self, request: Request, prefilled: PrefillResult, decoded: DecodeResult) -> Generation:
        """Returns an answer that has ended, with its timings. Raises UsageError if its constraint was too complex."""
        if prefilled.sampler.allowed is not None and prefilled.sampler.allowed.error is not None:
            raise prefilled.sampler.allowed.error
        timings = Timings(
            **prefilled.stages_ms,
            load_ms=self.load_ms,
            image_open_ms=request.image_open_ms,
            compile_ms=self.encoder.compile_ms,
            decode_tps=decoded.decode_tps,
            prompt_tokens=prefilled.prompt_tokens,
            generated_tokens=len(decoded.token_ids),
            cold=prefilled.cold,
            cached_images=prefilled.cached_images,
            reused_tokens=prefilled.reused_tokens,
        )
        reported = prefilled.sampler.logprobs
        out_of_context = decoded.finish_reason == "length" and len(decoded.token_ids) < request.options.max_tokens
        return Generation(
            decoded.text,
            decoded.token_ids,
            timings,
            "context" if out_of_context else decoded.finish_reason,
            prefilled.prompt_tokens,
            decoded.stop_reason,
            request.options.constraint,
            None if reported is None else tuple(map(reported.read, range(len(decoded.token_ids)))),
        )

    def prepare(self, request: Request, images: Sequence[ImageItem] = ()) -> PreparedRequest:
        """Encodes the prompt and preprocesses the images of a request. Does not need the lock.

        `images` are those of earlier messages, before those of the request.

        Raises:
            PromptError: the prompt does not fit the images, the context or the model.
            UsageError: a constraint is too complex, or the model has no end token.
        """
        clock = LapClock()
        prompt = self.prompts.encode(request.messages)
        length = self._checked_length(prompt, len(images) + len(request.images))
        size, fit = self.encoder.image_size, request.fit or cast("Fit", self.config.image_aspect_ratio)
        own = [ImageItem(preprocess(image, size, fit)) for image in request.images]
        items = prompt_items(prompt, [*images, *own])
        options = request.options
        allowed = self.vocabulary.start(options.constraint, options.ignore_eos) if options.constraint else None
        return PreparedRequest(request, items, prompt.ids, length, clock.lap_ms(), allowed)

    def encode_ahead(self, request: Request | PreparedRequest) -> PreparedRequest:
        """Submits the images of a request to the encoder process while it has room, and returns at once."""
        prepared = request if isinstance(request, PreparedRequest) else self.prepare(request)
        if self.encode_ahead_limit and len(prepared.submitted) < min(ENCODE_AHEAD, image_count(prepared.items)):
            self._submit(prepared, self.prefix_cache.count(prepared.items))
        return prepared

    def prefill(
        self,
        asked: Request | PreparedRequest,
        cached: CachedPrompt,
        images: Sequence[ImageItem] = (),
        answer_capacity: int = ANSWER_CAPACITY,
    ) -> PrefillResult:
        """Computes the prompt of a request and the first token of its answer.

        The prompt may begin with what `cached` holds, and replaces it. After an error `cached` is empty. `images` are
        those of earlier messages, before those of the request. The cache gets room for an answer of `answer_capacity`
        tokens. If that is 0, nobody may change the cache, and it is kept for later prompts.

        Raises:
            PromptError: the prompt does not fit the images, the context or the model.
            PackageError: the encoder cannot run.
            UsageError: a constraint is too complex, or the model has no end token.
            WeightsError: the logits are not finite.
        """
        chunks = self.prefill_chunks(asked, cached, images, answer_capacity)
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                result: PrefillResult = end.value
                return result

    def prefill_chunks(
        self,
        asked: Request | PreparedRequest,
        cached: CachedPrompt,
        images: Sequence[ImageItem] = (),
        answer_capacity: int = ANSWER_CAPACITY,
        chunk: int = PREFILL_CHUNK,
    ) -> Generator[int, None, PrefillResult]:
        """Does the same as `prefill`, and yields the number of positions after every `chunk` of them.

        The lock is free while the generator waits, so that other answers can continue.
        """
        prepared = asked if isinstance(asked, PreparedRequest) else self.prepare(asked, images)
        stages = self._prefill(prepared, cached, answer_capacity, chunk)
        while True:
            with self.lock, self.mlx_stream():
                try:
                    count = next(stages)
                except StopIteration as end:
                    self.memory.after_prefill()
                    result: PrefillResult = end.value
                    return result
            yield count

    def _prefill(
        self, prepared: PreparedRequest, cached: CachedPrompt, answer_capacity: int, chunk: int
    ) -> Generator[int, None, PrefillResult]:
        clock, stages_ms = LapClock(), {"preprocess_ms": prepared.preprocess_ms}
        request, items, length = prepared.request, prepared.items, prepared.prompt_tokens
        hits = self.feature_cache.hits
        reused, cache = self._reuse(items, cached)
        reused_tokens = position_count(items[:reused], self.config.tokens_per_image)
        cached_images = image_count(items[:reused])
        prefix = reusable_prefix(request.messages, items)
        image_features, reused, cache = self._encode(prepared, prefix, reused, cache)
        cached_images += self.feature_cache.hits - hits
        stages_ms["encode_ms"] = clock.lap_ms()
        projected = self._project(image_features)
        stages_ms["project_ms"] = clock.lap_ms()
        if image_features and not self.encode_ahead_limit:
            yield len(image_features) * self.config.tokens_per_image  # encoding here has stalled other answers
        max_new_tokens = min(request.options.max_tokens, self.config.max_context - length)
        if reused < len(prefix):
            reused, cache = len(prefix), self._extend_prefix(prefix, reused, cache)
        cache = cache or self._new_cache(0)
        for layer in cache:
            layer.reserve(length + min(max_new_tokens, answer_capacity))
        inputs_embeds = self._embed(items[reused:], projected)
        last = (inputs_embeds.shape[1] - 1) // chunk * chunk
        for start in range(0, last, chunk):
            self.language.language_model.extend(inputs_embeds[:, start : start + chunk], cache)
            evaluate(cache)
            yield chunk
        logits = prefill(self.language.language_model, inputs_embeds[:, last:], cache)
        if on_cpu():
            _check_finite(logits)
            stages_ms["prefill_ms"] = clock.lap_ms()
        options = request.options
        sampler = Sampler(options.sampling, prepared.prompt_ids, prepared.allowed, options.logprobs)
        first = sampler(logits[0])
        if on_cpu():
            mx.eval(first, *sampler.state)
        else:  # one wait for both, because sampling takes hardly any time on a GPU
            _check_finite(logits, first, *sampler.state)
            stages_ms["prefill_ms"] = clock.lap_ms()
        stages_ms["sample_ms"] = clock.lap_ms()
        cached.put(items, cache)
        if not answer_capacity:
            self.prefix_cache.add(items, cache)
        return PrefillResult(
            first,
            logits if request.options.beams.num_beams > 1 else None,
            cache,
            items,
            sampler,
            max_new_tokens,
            prompt_tokens=length,
            reused_tokens=reused_tokens,
            cached_images=cached_images,
            stages_ms=stages_ms,
            cold=next(_answers) == 0,
        )

    def _checked_length(self, prompt: Prompt, image_count: int) -> int:
        """Returns the positions of a prompt. Raises PromptError if it does not fit the images, context or model."""
        if prompt.image_count != image_count:
            raise PromptError(
                f"the prompt has {prompt.image_count} image placeholders, but {image_count} images were given. Mark "
                "one place per image, or none"
            )
        length = prompt.token_count(self.config.tokens_per_image)
        if length == 0:
            raise PromptError("the prompt is empty, and the chat template adds nothing to it. Write a prompt")
        if length >= self.config.max_context:
            images = f" ({self.config.tokens_per_image} per image)" if image_count else ""
            raise PromptError(
                f"the prompt takes {length:,} tokens{images}, but the context has {self.config.max_context:,} with the "
                "answer. Shorten the prompt, or start a new chat"
            )
        highest = max((i for i in prompt.ids if i != prompt.image_token_index), default=0)
        rows = self.language.vocabulary_rows
        if highest >= rows:
            raise PromptError(f"the prompt contains token {highest}, but the model has {rows} embeddings")
        return length

    def _reuse(self, items: Sequence[PromptItem], cached: CachedPrompt) -> tuple[int, list[KVCache]]:
        """Returns how many of `items` are cached, by this conversation or as a prefix, and the cache."""
        own, cache = cached.take(items, self.config.tokens_per_image)
        reused, prefix = self.prefix_cache.longest(items)
        return (own, cache) if own >= reused else (reused, prefix)

    def _encode(
        self, prepared: PreparedRequest, prefix: Sequence[int], reused: int, cache: list[KVCache]
    ) -> tuple[list[NDArray[np.float32]], int, list[KVCache]]:
        """Returns `image_features` (1, N, C) of each image that is not cached.

        An encoder process encodes while this one computes a new text prefix.
        """
        images = [item for item in prepared.items[reused:] if isinstance(item, ImageItem)]
        if self.encode_ahead_limit and reused < len(prefix):
            self._submit(prepared, reused)
            reused, cache = len(prefix), self._extend_prefix(prefix, reused, cache)
        return [self._features(image) for image in images], reused, cache

    def _submit(self, prepared: PreparedRequest, reused: int) -> None:
        """Submits the images after `reused` items to the encoder process, unless they are cached or in it already."""
        if not isinstance(self.encoder, SeparateEncoder):
            return
        for image in prepared.items[reused:]:
            if not isinstance(image, ImageItem):
                continue
            if self.encoder.room() == 0 or len(prepared.submitted) == ENCODE_AHEAD:
                return
            if not self.feature_cache.holds(image) and image.digest not in self._pending:
                self._pending[image.digest] = pending = self.encoder.submit(to_pixel_values(image.pixels))
                prepared.submitted.append(pending)

    def _features(self, image: ImageItem) -> NDArray[np.float32]:
        """Returns `image_features` (1, N, C), from the cache, from the encoder process, or encoded now."""
        features = self.feature_cache.get(image)
        if features is not None:
            return features
        pending = self._pending.pop(image.digest, None)
        features = pending.result() if pending is not None else self.encoder.encode(to_pixel_values(image.pixels))
        self.feature_cache.put(image, features)
        return features

    def _project(self, image_features: list[NDArray[np.float32]]) -> list[mx.array]:
        """Returns the embeddings (1, N, D) of each image. A package with the projector has them already."""
        projector = self.language.multi_modal_projector
        if self.encoder.projected:
            projected = [mx.array(features).astype(projector.linear_2.bias.dtype) for features in image_features]
        else:
            projected = [projector(mx.array(features)) for features in image_features]
        mx.eval(projected)
        return projected

    def _extend_prefix(
        self, prefix: Sequence[PromptItem], reused: int, cache: list[KVCache], pinned: bool = False
    ) -> list[KVCache]:
        """Returns a cache of a text prefix, of which `cache` holds `reused` ids, and stores it for other prompts."""
        cache = [layer.fork(len(prefix)) for layer in cache] if cache else self._new_cache(len(prefix))
        self.language.language_model.extend(self._embed(prefix[reused:], []), cache)
        evaluate(cache)
        self.prefix_cache.add(prefix, cache, pinned)
        return [layer.fork() for layer in cache]

    def _new_cache(self, capacity: int) -> list[KVCache]:
        return self.language.language_model.make_cache(capacity, self.kv_bits)

    def _embed(self, items: Sequence[PromptItem], projected: Sequence[mx.array]) -> mx.array:
        """Returns `inputs_embeds` (1, L, D): the embeddings of the text, with those of each image in its place."""
        images = iter(projected)
        decoder = self.language.language_model
        parts = [
            next(images) if isinstance(segment, ImageItem) else decoder.embed(mx.array([segment]))
            for segment in segments(items)
        ]
        return mx.concatenate(parts, axis=1)  # (1, L, D)


def reusable_prefix(messages: Sequence[Message], items: Sequence[PromptItem]) -> list[int]:
    """Returns the ids before the first image if the template and the system prompt wrote them, else an empty list.

    Text that a user wrote will hardly come again, and computing it separately costs a pass over the weights.
    """
    question = next((message for message in messages if message.role == "user"), None)
    if question is None or not question.image_count:
        return []
    image_comes_first = IMAGE_TOKEN not in question.content or question.content.startswith(IMAGE_TOKEN)
    prefix = text_prefix(items) if image_comes_first else []
    return prefix if len(prefix) <= MAX_PREFIX_TOKENS else []


def _check_finite(logits: mx.array, *others: mx.array) -> None:
    """Computes the logits and `others` together. Raises WeightsError if the logits are not finite."""
    finite = mx.isfinite(logits).all()
    mx.eval(logits, finite, *others)
    if not finite.item():
        dtype = str(logits.dtype).removeprefix("mlx.core.")
        raise WeightsError(
            f"the decoder computed logits that are not finite: its weights are damaged, or overflow {dtype}. Export "
            "the model again"
        )
