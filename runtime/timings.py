"""Where the time goes, in words that the whole toolkit uses. Times are milliseconds of wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Clock = Callable[[], float]
"""Seconds, never going back."""

TTFT_STAGES = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms", "sample_ms")


@dataclass(frozen=True)
class Timings:
    """The time of one answer.

    `ttft_ms` runs from a decoded image and a prompt in hand to the first token's id on the host; it is the sum of its
    stages. Apart from it stand `load_ms` (the model), `image_open_ms` (files to pixels) and `compile_ms` (first use of
    a package on an engine). `cold` marks the first answer of a process, which is never to be mixed with later ones.
    """

    preprocess_ms: float
    """Pixels into the encoder's square, and the prompt into ids."""
    encode_ms: float
    project_ms: float
    prefill_ms: float
    sample_ms: float
    load_ms: float
    image_open_ms: float
    compile_ms: float
    decode_tps: float | None
    """(n - 1) / (t_last - t_first): tokens per second after the first; None for fewer than two."""
    prompt_tokens: int
    """Positions that the prompt took, images included."""
    generated_tokens: int
    """Tokens in the answer: without the one that stopped it."""
    cold: bool
    cached_images: int = 0
    """Images whose features were remembered from an earlier answer: `encode_ms` is without them."""
    reused_tokens: int = 0
    """Positions of the prompt that had been read before (its fixed beginning, or a conversation): `prefill_ms` is
    without them."""

    @property
    def ttft_ms(self) -> float:
        return sum(getattr(self, stage) for stage in TTFT_STAGES)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, to a microsecond; `ttft_ms` comes first."""
        values = {"ttft_ms": self.ttft_ms, **asdict(self)}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


class LapClock:
    """Contiguous laps: each begins where the one before ended, so that together they are the whole."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()

    def lap_ms(self) -> float:
        now = self._clock()
        elapsed, self._last = now - self._last, now
        return 1000 * elapsed
