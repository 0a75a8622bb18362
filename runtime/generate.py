"""Prefill, decoding token by token, and the end of an answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from ..models._mlx import mx, on_cpu
from ..models.errors import UsageError
from ..models.kv_cache import KVCache
from ..models.qwen2 import Qwen2
from .beam_search import BeamOptions
from .logprobs import TokenLogprob, check_count
from .sampling import Sampler, SamplingOptions, id_on_host
from .structured import Constraint
from .timings import Clock, Timings
from .tokenizer import TextStream, Tokenizer

PREFILL_CHUNK = 1024
"""Positions per forward pass. The limit bounds the memory for activations: 0.1 GB for the 0.5B in float32."""

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class GenerationOptions:
    """When an answer ends, how its tokens are sampled, and the form that it must have."""

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end the answer. They are not part of it."""
    ignore_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    constraint: Constraint | None = None
    beams: BeamOptions = field(default_factory=BeamOptions)
    logprobs: int | None = None
    """The alternatives whose probabilities are reported with those of each token. None reports none."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 1:
            raise UsageError(f"max_tokens must be an integer of at least 1 (got {self.max_tokens!r:.60})", "max_tokens")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be strings of at least one character (got {self.stop!r:.60})", "stop")
        check_count(self.logprobs)
        if self.beams.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        """Raises UsageError for options that beam search has no meaning for."""
        others = {"temperature": self.sampling.temperature > 0, "logprobs": self.logprobs is not None}
        if self.constraint is not None:
            others[self.constraint.argument] = True
        for name in (name for name, given in others.items() if given):
            raise UsageError(
                f"num_beams above 1 cannot be combined with {name} (got {self.beams.num_beams} beams). Leave one out.",
                "num_beams",
                name,
            )


@dataclass(frozen=True)
class Generation:
    """One answer.

    `finish_reason` is `stop` if the model or a stop string ended the answer, `length` if it has `max_tokens`, and
    `context` if the context is full.
    """

    text: str
    token_ids: tuple[int, ...]
    """The generated ids, without the prompt and without the token that ended the answer."""
    timings: Timings
    finish_reason: FinishReason
    prompt_tokens: int
    stop_reason: int | str | None = None
    """The end token or the stop string that ended the answer. None for `length` and `context`."""
    constraint: Constraint | None = field(default=None, repr=False)
    """The form that the answer was held to."""
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)
    """The `logprob` of each of `token_ids`, with the likeliest tokens at its place (`top`), if they were asked for."""

    @property
    def parsed(self) -> Any:
        """The content of an answer to a `schema`: an instance of the Pydantic model, or plain Python values.

        None without a schema, and if `max_tokens`, the context or a stop string ended the answer: its text is then
        only a prefix of the JSON.

        Raises:
            UsageError: validators of the model that the schema cannot express refuse the answer.
        """
        complete = isinstance(self.stop_reason, int)
        return self.constraint.parsed(self.text) if self.constraint and complete else None


@dataclass(frozen=True)
class DecodeResult:
    """The text and ids of an answer that has ended. The fields are those of `Generation` and `Timings`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    decode_tps: float | None
    stop_reason: int | str | None = None


def prefill(decoder: Qwen2, inputs_embeds: mx.array, cache: list[KVCache]) -> mx.array:
    """Extends `cache` with `inputs_embeds` (B, L, D). Returns lazy logits (B, V) at the last position."""
    L = inputs_embeds.shape[1]
    last = (L - 1) // PREFILL_CHUNK * PREFILL_CHUNK
    for start in range(0, last, PREFILL_CHUNK):
        decoder.extend(inputs_embeds[:, start : start + PREFILL_CHUNK], cache)
        mx.eval([layer.buffers for layer in cache])
    return decoder(inputs_embeds[:, last:], cache)[:, -1]  # (B, V)


def decode_one_token(decoder: Qwen2, tokens: mx.array, cache: list[KVCache]) -> mx.array:
    """Extends `cache` with tokens (B,). Returns lazy logits (B, V) of the next token."""
    return decoder(decoder.embed(tokens[:, None]), cache)[:, -1]  # (B, V)


def default_lookahead() -> int:
    """Returns how many steps to launch before an id is read: 1 on a GPU, so that it never waits, and 0 on a CPU."""
    return 0 if on_cpu() else 1


def decode(
    decoder: Qwen2, first: mx.array, cache: list[KVCache], sampler: Sampler, count: int, lookahead: int | None = None
) -> Iterator[int]:
    """Yields `count` ids after the token `first` (1,).

    `lookahead` steps are launched before an id is yielded (None: see `default_lookahead`). If the answer ends early,
    `cache` holds that many more positions than were yielded.
    """
    if lookahead is None:
        lookahead = default_lookahead()
    pending: deque[mx.array] = deque()
    token, begun = first, 0
    for _ in range(count):
        while begun < count and len(pending) <= lookahead:
            token = sampler(decode_one_token(decoder, token, cache)[0])
            mx.async_eval(token, *sampler.state)
            pending.append(token)
            begun += 1
        yield id_on_host(pending.popleft())


def read_answer(
    token_ids: Iterator[int],
    tokenizer: Tokenizer,
    eos_token_ids: Sequence[int],
    stop: Sequence[str],
    clock: Clock = time.perf_counter,
    at_once: bool = False,
) -> Generator[str, None, DecodeResult]:
    """Yields the text of an answer as its ids come, and returns the whole of it. See `AnswerReader`."""
    reader = AnswerReader(tokenizer, eos_token_ids, stop, clock, at_once)
    for token_id in token_ids:
        if piece := reader.push(token_id):
            yield piece
        if reader.ended:
            break
    if held := reader.flush():
        yield held
    return reader.result


class AnswerReader:
    """Turns ids into text, one by one, and finds the end of the answer.

    If all ids come `at_once`, after a search, their rate counts from the beginning of the search.

    Attributes:
        ended: True once an end token or a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        stop: Sequence[str],
        clock: Clock = time.perf_counter,
        at_once: bool = False,
    ) -> None:
        self._characters, self._filter = TextStream(tokenizer), StopStrings(stop)
        self._eos_token_ids = eos_token_ids
        self._ids: list[int] = []
        self._text: list[str] = []
        self._reason: FinishReason = "length"
        self._stop_reason: int | str | None = None
        self._clock, self._at_once = clock, at_once
        self._first = self._last = clock()
        self.ended = False

    def push(self, token_id: int) -> str:
        """Returns the text that is complete with this id. Often it is empty."""
        now = self._clock()
        if token_id in self._eos_token_ids:
            self._end(token_id)
            return ""
        self._first, self._last = (self._first if self._ids or self._at_once else now), now
        self._ids.append(token_id)
        piece = self._filter.push(self._characters.push(token_id))
        self._text.append(piece)
        if self._filter.found is not None:
            self._end(self._filter.found)
        return piece

    def flush(self) -> str:
        """Returns the text that was held back as the possible start of a stop string. Called when no more ids come."""
        held = "" if self._filter.found is not None else self._filter.flush()
        self._text.append(held)
        return held

    @property
    def count(self) -> int:
        """The number of ids so far, without the one that ended the answer."""
        return len(self._ids)

    @property
    def result(self) -> DecodeResult:
        """The answer so far."""
        count, seconds = len(self._ids), self._last - self._first
        tps = (count - 1) / seconds if count > 1 and seconds > 0 else None
        return DecodeResult("".join(self._text), tuple(self._ids), self._reason, tps, self._stop_reason)

    def _end(self, stop_reason: int | str) -> None:
        self._reason, self._stop_reason, self.ended = "stop", stop_reason, True


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may be the start of one.

    Attributes:
        found: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Returns the text that is known to be before any stop string."""
        text = self._held + piece
        places = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            end, self.found = min(places)
        else:
            end = len(text) - self._open_end(text)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Returns the text that was held back. Called when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """Returns the length of the longest end of `text` that starts a stop string."""
        lengths = range(min(len(text), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


class Stream:
    """An answer that is decoded while it is read: an iterator over text, and a context manager.

    Leaving the context closes the stream, so that nothing more is computed.
    """

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._generation = end.value
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self) -> Generation:
        """Reads the stream to its end and returns the whole answer."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Ends the answer here and frees its memory. Nothing more is computed.

        Raises:
            UsageError: another thread is reading the stream.
        """
        try:
            self._pieces.close()
        except ValueError:  # "generator already executing"
            raise UsageError("another thread is reading this answer. Close it there") from None

    @property
    def generation(self) -> Generation:
        """The whole answer. Raises UsageError before the end of the stream."""
        if self._generation is None:
            raise UsageError("the answer is not complete. Read the stream to its end first")
        return self._generation


def options_from(
    stop: Any,
    max_tokens: int,
    ignore_eos: bool,
    sampling: SamplingOptions,
    constraint: Constraint | None = None,
    beams: BeamOptions | None = None,
    logprobs: int | None = None,
) -> GenerationOptions:
    """Returns the options. `stop` is one string or several. Raises UsageError."""
    strings = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    return GenerationOptions(max_tokens, strings, ignore_eos, sampling, constraint, beams or BeamOptions(), logprobs)
