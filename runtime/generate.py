"""Token by token: prefill, decoding, and what ends an answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models._mlx import mx, on_cpu
from ..models.errors import UsageError
from ..models.kv_cache import KVCache
from ..models.qwen2 import Qwen2
from .sampling import Sampler, SamplingOptions, id_on_host
from .timings import Clock, Timings
from .tokenizer import TextStream, Tokenizer

PREFILL_CHUNK = 2048
"""Positions per forward pass: bounds the memory that attention scores and activations take."""

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationOptions:
    """When an answer ends, and how its tokens are picked."""

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    ignore_eos: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 1:
            raise UsageError(f"max_tokens should be a whole number from 1; found {self.max_tokens!r:.60}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop should hold texts of at least one character; found {self.stop!r:.60}")


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Generated ids, without the prompt and without the token that stopped the answer."""
    timings: Timings
    finish_reason: FinishReason
    """`eos`: the model ended it; `stop`: a stop text came; `length`: it has max_tokens; `context`: there is no room."""
    prompt_tokens: int


@dataclass(frozen=True)
class Ending:
    """What is known of an answer once it has ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    decode_tps: float | None


def prefill(decoder: Qwen2, inputs_embeds: mx.array, cache: list[KVCache]) -> mx.array:
    """Takes (B, L, D) into `cache`; logits (B, V) at the last position, not yet evaluated."""
    L = inputs_embeds.shape[1]
    last = (L - 1) // PREFILL_CHUNK * PREFILL_CHUNK
    for start in range(0, last, PREFILL_CHUNK):
        decoder.extend(inputs_embeds[:, start : start + PREFILL_CHUNK], cache)
        mx.eval([layer.buffers for layer in cache])
    return decoder(inputs_embeds[:, last:], cache)[:, -1]  # (B, V)


def decode_one_token(decoder: Qwen2, tokens: mx.array, cache: list[KVCache]) -> mx.array:
    """Takes tokens (B,) into `cache`; logits (B, V) of what follows them, not yet evaluated."""
    return decoder(decoder.embed(tokens[:, None]), cache)[:, -1]  # (B, V)


def default_lookahead() -> int:
    """Steps to launch before an id is read: a GPU should never wait for the host, and a CPU is the host."""
    return 0 if on_cpu() else 1


def decode(
    decoder: Qwen2, first: mx.array, cache: list[KVCache], sampler: Sampler, count: int, lookahead: int | None = None
) -> Iterator[int]:
    """`count` ids that follow the token `first` (1,).

    `lookahead` steps are launched before an id is handed out (None: see `default_lookahead`). When an answer ends
    early, `cache` holds that many positions more than were handed out.
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
) -> Generator[str, None, Ending]:
    """Turns ids into pieces of text until the answer ends; returns what it came to."""
    reader = AnswerReader(tokenizer, eos_token_ids, stop, clock)
    for token_id in token_ids:
        if piece := reader.push(token_id):
            yield piece
        if reader.ended:
            break
    if held := reader.flush():
        yield held
    return reader.ending


class AnswerReader:
    """Turns ids into text, one by one, and sees where the answer ends.

    Attributes:
        ended: whether an end-of-text token or a stop text has come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        stop: Sequence[str],
        clock: Clock = time.perf_counter,
    ) -> None:
        self._characters, self._pieces = TextStream(tokenizer), StopTexts(stop)
        self._eos_token_ids = eos_token_ids
        self._ids: list[int] = []
        self._text: list[str] = []
        self._reason: FinishReason = "length"
        self._clock = clock
        self._first = self._last = clock()
        self.ended = False

    def push(self, token_id: int) -> str:
        """The text that is complete with this id; often none."""
        now = self._clock()
        if token_id in self._eos_token_ids:
            self._reason, self.ended = "eos", True
            return ""
        self._first, self._last = (self._first if self._ids else now), now
        self._ids.append(token_id)
        piece = self._pieces.push(self._characters.push(token_id))
        self._text.append(piece)
        if self._pieces.found:
            self._reason, self.ended = "stop", True
        return piece

    def flush(self) -> str:
        """What was held back as the beginning of a stop text, when no more ids come."""
        held = "" if self._pieces.found else self._pieces.flush()
        self._text.append(held)
        return held

    @property
    def ending(self) -> Ending:
        """What the answer has come to so far."""
        count, seconds = len(self._ids), self._last - self._first
        tps = (count - 1) / seconds if count > 1 and seconds > 0 else None
        return Ending("".join(self._text), tuple(self._ids), self._reason, tps)


class StopTexts:
    """Lets text through up to the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is now known to stand before any stop text."""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        self.found = bool(places)
        end = min(places) if places else len(text) - self._open_end(text)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        lengths = range(min(len(text), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


class Stream:
    """The pieces of an answer as they come; `generation` is the whole once they have."""

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def read(self) -> Generation:
        """The whole answer, once its pieces have come."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Ends the answer here: nothing more is computed, and what it held is freed."""
        try:
            self._pieces.close()
        except ValueError:  # "generator already executing"
            raise UsageError("the answer is being read in another thread: it can be closed there") from None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._generation = end.value
            raise StopIteration from None

    @property
    def generation(self) -> Generation:
        """Raises UsageError while pieces are left."""
        if self._generation is None:
            raise UsageError("the answer is not complete: read the stream to its end first")
        return self._generation


def options_from(stop: Any, max_tokens: int, ignore_eos: bool, sampling: SamplingOptions) -> GenerationOptions:
    """`stop` may be one text or several. Raises UsageError."""
    texts = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    return GenerationOptions(max_tokens, texts, ignore_eos, sampling)
