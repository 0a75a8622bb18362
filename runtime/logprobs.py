"""The probabilities that a model gave to the tokens of its answer, and to their alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ..models._mlx import mx
from ..models.errors import UsageError

MAX_TOP = 20
"""The most alternatives per token, as in OpenAI's API."""


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability.

    The probabilities are softmax of the model's logits in float32, whatever temperature, penalty, constraint or cut
    the token was then chosen with.
    """

    token_id: int
    """The token's id."""
    logprob: float
    """The log-probability, 0 or less."""
    top: tuple[tuple[int, float], ...]
    """The ids and log-probabilities of the likeliest tokens at this place, the likeliest first."""


def check_count(count: int | None) -> None:
    """Raises UsageError unless `count` is None or the number of alternatives per token."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_TOP):
        raise UsageError(f"logprobs must be from 0 to {MAX_TOP}, or None for none (got {count!r:.60})", "logprobs")


class Logprobs:
    """The log-probabilities of an answer's tokens, one after the other.

    Attributes:
        count: the number of alternatives for each.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._ids: list[mx.array] = []
        self._values: list[mx.array] = []

    def append(self, logits: mx.array, ids: mx.array) -> None:
        """Appends a token, the first of `ids`, and its alternatives, chosen from logits (V,). Evaluates nothing."""
        below = logits.astype(mx.float32) - logits.max()  # small numbers lose nothing to the logits' size
        self._ids.append(ids)
        self._values.append(below[ids] - mx.log(mx.exp(below).sum()))

    @property
    def last(self) -> list[mx.array]:
        """The arrays of the last token, to be evaluated with it."""
        return [*self._ids[-1:], *self._values[-1:]]

    def read(self, place: int) -> TokenLogprob:
        """Returns those of the token at `place`, once it is evaluated."""
        ids = cast("list[int]", self._ids[place].tolist())
        values = cast("list[float]", self._values[place].tolist())
        return TokenLogprob(ids[0], values[0], tuple(zip(ids[1:], values[1:], strict=True)))
