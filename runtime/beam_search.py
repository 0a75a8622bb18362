"""Beam search: the likeliest of several answers that are decoded side by side, as transformers defines it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ..models._mlx import mx
from ..models.errors import UsageError
from ..models.kv_cache import KVCache, selected
from ..models.qwen2 import Qwen2
from .sampling import descending, marks, penalized

MAX_BEAMS = 64
"""The most beams. Each has its own keys and values, and the search sorts the scores of all their next tokens."""

MAX_LENGTH_PENALTY = 10.0
"""The largest exponent, positive or negative. Beyond it the length alone decides, and powers of it overflow."""


@dataclass(frozen=True)
class BeamOptions:
    """Options of beam search with the names and meanings of transformers.

    Attributes:
        num_beams: the number of answers that are kept at each step. 1 does not search.
        length_penalty: the exponent of the length by which the log-probability of a complete answer is divided. Above 0
            it favors long answers, below 0 short ones.
        early_stopping: True ends the search with `num_beams` complete answers. False ends it if the best open answer,
            at its length, is worse than they are. `never` ends it if it cannot become better at any length.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        beams, penalty = self.num_beams, self.length_penalty
        if not isinstance(beams, int) or isinstance(beams, bool) or not 1 <= beams <= MAX_BEAMS:
            raise UsageError(f"num_beams must be an integer from 1 to {MAX_BEAMS} (got {beams!r:.60})", "num_beams")
        number = isinstance(penalty, int | float) and not isinstance(penalty, bool) and math.isfinite(penalty)
        if not number or abs(penalty) > MAX_LENGTH_PENALTY:
            raise UsageError(
                f"length_penalty must be from -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g} (got {penalty!r:.60})",
                "length_penalty",
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UsageError(
                f"early_stopping must be True, False or 'never' (got {self.early_stopping!r:.60})", "early_stopping"
            )


@dataclass(frozen=True)
class Beam:
    """An answer so far. `score` is its log-probability, divided by a power of its length once it is complete."""

    score: float
    token_ids: tuple[int, ...] = ()


class BeamSearch:
    """The open and complete answers of a search, apart from the network that scores them.

    It follows `_beam_search` of transformers 5, for one prompt.

    Attributes:
        running: the open answers, the likeliest first.
        finished: at most `num_beams` complete answers, the best first.
        done: True if the search has ended.
    """

    def __init__(self, options: BeamOptions, eos_token_ids: Sequence[int], max_tokens: int) -> None:
        self._options, self._eos_token_ids, self._max_tokens = options, frozenset(eos_token_ids), max_tokens
        self._length = 0
        self.running = [Beam(0.0)]
        self.finished: list[Beam] = []
        self.done = False

    @property
    def candidates(self) -> int:
        """The number of candidates per step. It suffices for `num_beams` that continue, however many end."""
        return max(2, 1 + len(self._eos_token_ids)) * self._options.num_beams

    def advance(self, scores: Sequence[float], parents: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Takes the likeliest candidates, the best first: the open answer that each continues, and its next token.

        Returns the previous open answer that each of the new ones continues.
        """
        self._length += 1
        count = self._options.num_beams
        full = self._length >= self._max_tokens
        kept: list[tuple[Beam, int]] = []
        for rank, (score, parent, token_id) in enumerate(zip(scores, parents, token_ids, strict=True)):
            beam = Beam(score, (*self.running[parent].token_ids, token_id))
            if not full and token_id not in self._eos_token_ids:
                kept.append((beam, parent))
            elif rank < count:  # a less likely one would not have been chosen either
                self.finished.append(Beam(self._penalized(score, self._length), beam.token_ids))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:count]
        kept = kept[:count]
        self.running = [beam for beam, _ in kept]
        self.done = full or not kept or self._is_settled()
        return [parent for _, parent in kept]

    @property
    def best(self) -> tuple[int, ...]:
        """The ids of the best complete answer, with its end token if it has one."""
        return self.finished[0].token_ids

    def _is_settled(self) -> bool:
        """Returns True if open answers need not be followed."""
        options = self._options
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = self._max_tokens if longest else self._length
        return self._penalized(self.running[0].score, length) <= self.finished[-1].score

    def _penalized(self, score: float, length: int) -> float:
        return score / float(length) ** self._options.length_penalty


def best_ids(
    decoder: Qwen2,
    logits: mx.array,
    cache: Sequence[KVCache],
    search: BeamSearch,
    repetition_penalty: float = 1.0,
    prompt_ids: Sequence[int] = (),
) -> Iterator[int | None]:
    """Yields None after every step of the search, then the ids of the best answer.

    `logits` (1, V) are those of the first token, and `cache` holds the prompt. It is not changed.
    """
    seen = marks(logits.shape[1], prompt_ids)[None] if repetition_penalty != 1 else None  # (1, V)
    scores = mx.zeros(1)
    layers = list(cache)
    while True:
        logits = logits.astype(mx.float32)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # (B, V)
        if seen is not None:
            log_probabilities = penalized(log_probabilities, seen, repetition_penalty)
        totals = (log_probabilities + scores[:, None]).reshape(-1)  # (B * V,)
        order = descending(totals, min(search.candidates, totals.size))
        likeliest = totals[order]
        mx.eval(order, likeliest)
        places, V = cast("list[int]", order.tolist()), logits.shape[1]
        parents = search.advance(
            cast("list[float]", likeliest.tolist()), [place // V for place in places], [place % V for place in places]
        )
        if search.done:
            yield from search.best
            return
        yield None
        if layers[0].rows != len(parents) or parents != list(range(len(parents))) or layers[0] is cache[0]:
            layers = [selected(layer, parents) for layer in layers]
        tokens = mx.array([beam.token_ids[-1] for beam in search.running])
        scores = mx.array([beam.score for beam in search.running])
        if seen is not None:
            seen = seen[mx.array(parents)]
            seen[mx.arange(len(parents)), tokens] = True
        logits = decoder(decoder.embed(tokens[:, None]), layers)[:, -1]  # (B, V)
