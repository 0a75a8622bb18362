"""Sampling: logits -> the next token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..models._mlx import mx, on_cpu
from ..models.errors import UsageError
from .logprobs import Logprobs
from .structured import AllowedTokens

FEW = 1024
"""The likeliest tokens that are sorted first. `top_p` and `min_p` seldom keep more of a trained model's."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options with Hugging Face's names and meanings, applied in its order.

    Attributes:
        temperature: the divisor of the logits. 0 picks the likeliest token.
        top_p: keeps the fewest candidates whose probabilities add up to it. 1 keeps all.
        top_k: keeps this many of the likeliest candidates. 0 keeps all.
        min_p: keeps candidates with at least this share of the likeliest one's probability. 0 keeps all.
        repetition_penalty: divides the positive logits of tokens in the prompt and the answer, and multiplies their
            negative ones. 1 changes nothing.
        seed: gives the same answer each time on the same machine. None takes a new seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "a number from 0")
        _check("top_p", self.top_p, 0 < _number(self.top_p) <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, _whole(self.top_k), "a whole number from 0 (0 keeps all)")
        _check("min_p", self.min_p, 0 <= _number(self.min_p) <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < _number(penalty) < math.inf, "a number above 0 (1 for none)")
        _check("seed", self.seed, self.seed is None or (_whole(self.seed) and self.seed < 2**64), "from 0 to 2**64 - 1")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{name} must be {expected}, got {value!r:.60}", name)


class Sampler:
    """A sampler of tokens one after the other, with the state of `repetition_penalty`, the seed and a constraint.

    The state stays in MLX, so that the next step can be launched before the host knows the last token. A constraint
    needs that token on the host: then the sampler launches the forward pass, waits for the token, and finds the next
    allowed ones while the pass is computed.

    Attributes:
        prompt_ids: the ids of the prompt.
        allowed: the tokens that a constraint allows next, or None without one.
        logprobs: the log-probabilities of the tokens so far, or None if nobody asks for them.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt_ids: Sequence[int] = (),
        allowed: AllowedTokens | None = None,
        logprobs: int | None = None,
    ) -> None:
        self._options = options
        self.allowed = allowed
        self.logprobs = None if logprobs is None else Logprobs(logprobs)
        self._last: mx.array | None = None
        self.prompt_ids = prompt_ids
        self._seen: mx.array | None = None
        self._key = mx.random.key(secrets.randbits(64) if options.seed is None else options.seed)

    @property
    def greedy(self) -> bool:
        """True if each token is the likeliest one, whatever came before, and nothing else is computed."""
        options = self._options
        free = self.allowed is None and self.logprobs is None
        return options.temperature == 0 and options.repetition_penalty == 1 and free

    @property
    def state(self) -> list[mx.array]:
        """The arrays that the next token depends on. They must be evaluated before another thread resumes."""
        if self.greedy:
            return []
        reported = self.logprobs.last if self.logprobs is not None else []
        return [self._key, *(array for array in (self._seen, self._last) if array is not None), *reported]

    def __call__(self, logits: mx.array) -> mx.array:
        """Maps logits (V,) to the id (1,) of the next token, not yet evaluated."""
        if self.greedy:
            return mx.argmax(logits, keepdims=True)
        options, noise, plain = self._options, None, logits
        if options.temperature:
            self._key, key = mx.random.split(self._key)
            noise = mx.random.gumbel((candidate_count(logits.size, options),), key=key)
        if self.allowed is not None:
            mx.async_eval(logits, *([] if noise is None else [noise]))  # while the host finds the allowed tokens
            if self._last is not None:
                self.allowed.advance(id_on_host(self._last))
            logits = self.allowed.apply(logits)
        logits = logits.astype(mx.float32)
        if options.repetition_penalty != 1:
            self._seen = marks(logits.size, self.prompt_ids) if self._seen is None else self._seen
            logits = penalized(logits, self._seen, options.repetition_penalty)
        token = mx.argmax(logits, keepdims=True) if noise is None else sample(logits, options, noise)
        if self._seen is not None:
            self._seen[token] = True
        if self.allowed is not None:
            self._last = token
        if self.logprobs is not None:
            count = self.logprobs.count
            self.logprobs.append(plain, mx.concatenate([token, descending(plain, count)]) if count else token)
        return token


def id_on_host(token: mx.array) -> int:
    """Returns the id on the host. Waits until it is computed."""
    value = token.item()
    assert isinstance(value, int)
    return value


def ids_on_host(tokens: mx.array) -> list[int]:
    """Returns ids (B,) on the host. Waits until they are computed."""
    return cast("list[int]", tokens.tolist())


def pick(samplers: Sequence[Sampler], logits: mx.array) -> mx.array:
    """Maps logits (B, V) to ids (B,), one sampler per row, not yet evaluated. Takes one operation if all are greedy."""
    if all(sampler.greedy for sampler in samplers):
        return mx.argmax(logits, axis=-1)
    return mx.concatenate([sampler(logits[row]) for row, sampler in enumerate(samplers)])


def marks(size: int, ids: Sequence[int]) -> mx.array:
    """Returns an array (size,) that is True at `ids`. Ids outside of it are ignored."""
    marks = mx.zeros(size, mx.bool_)
    known = [token_id for token_id in ids if 0 <= token_id < size]
    if known:
        marks[mx.array(known)] = True
    return marks


def penalized(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Returns logits with the seen tokens less likely (arXiv 1909.05858, section 4.1)."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: mx.array, options: SamplingOptions, noise: mx.array) -> mx.array:
    """Draws a token (1,) from softmax(logits / temperature) among the candidates that `options` keep.

    `noise` are standard Gumbel numbers, one per candidate. The greatest sum is a draw (arXiv 1411.0030, section 2).
    """
    logits = logits / options.temperature
    if options.top_k == 0 and options.top_p == 1 and options.min_p == 0:
        return mx.argmax(logits + noise, keepdims=True)
    order, kept = candidates(logits, options)
    return order[mx.argmax(kept + noise[: kept.size], keepdims=True)]


def candidate_count(size: int, options: SamplingOptions) -> int:
    """Returns the number of logits that `top_k` keeps of `size`."""
    return min(options.top_k, size) if options.top_k else size


def candidates(logits: mx.array, options: SamplingOptions) -> tuple[mx.array, mx.array]:
    """Returns the indices of the greatest logits, in descending order, and their logits with -inf for dropped ones.

    All that `options` keep are among them. On a CPU that is found out with the first few, because a vocabulary takes
    ten times as long to sort. A GPU sorts fast, and must not wait for the host.
    """
    if options.top_k:
        order = descending(logits, options.top_k)
        return order, cut(logits[order], mx.softmax(logits[order]), options)
    probabilities = mx.softmax(logits)
    if on_cpu() and logits.size > FEW:
        order = first_few(np.array(logits))
        kept = cut(logits[order], probabilities[order], options)
        if 0 < order.size < FEW or kept[-1].item() == -math.inf:
            return order, kept
    order = descending(logits, 0)
    return order, cut(logits[order], probabilities[order], options)


def first_few(logits: np.ndarray) -> mx.array:
    """Returns the indices of the FEW greatest logits and their equals, in the order of `descending`, without -inf."""
    least = max(np.partition(logits, -FEW)[-FEW], np.finfo(logits.dtype).min)
    places = np.flatnonzero(~(logits < least))
    return mx.array(places[np.argsort(-logits[places], kind="stable")].astype(np.uint32))


def cut(logits: mx.array, probabilities: mx.array, options: SamplingOptions) -> mx.array:
    """Returns descending `logits` with -inf for those that `top_p` and then `min_p` drop. The first is always kept."""
    if options.top_p < 1:  # the fewest whose probabilities reach top_p
        before = mx.cumsum(probabilities) - probabilities
        logits = mx.where(before < options.top_p, logits, -mx.inf)
    if options.min_p:
        logits = mx.where(logits >= logits[0] + math.log(options.min_p), logits, -mx.inf)
    return logits


def descending(logits: mx.array, count: int) -> mx.array:
    """Returns the indices of the `count` greatest logits, or of all for 0, the greatest first."""
    if not 0 < count < logits.size:
        return mx.argsort(-logits)
    greatest = mx.argpartition(-logits, count - 1)[:count]  # nine times as fast as sorting a whole vocabulary
    return greatest[mx.argsort(-logits[greatest])]
