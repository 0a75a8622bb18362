"""The time of an answer by stage, in milliseconds of wall clock, under the names that the whole toolkit uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Clock = Callable[[], float]
"""Returns a time in seconds that never goes back."""

TTFT_STAGES = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms", "sample_ms")
"""The stages of the time to first token, in order."""


@dataclass(frozen=True)
class Timings:
    """The time of one answer.

    `ttft_ms` is the time from decoded images and a prompt to the first token's id on the host, the sum of its stages.
    Loading, opening images and compiling are not part of it.
    """

    preprocess_ms: float
    """Resizing of the images to the encoder's square, and encoding of the prompt into ids."""
    encode_ms: float
    """The vision encoder."""
    project_ms: float
    """The projector."""
    prefill_ms: float
    """The decoder's pass over the prompt."""
    sample_ms: float
    """Sampling of the first token, until its id is on the host."""
    load_ms: float
    """Loading of the model."""
    image_open_ms: float
    """Decoding of the image files into pixels."""
    compile_ms: float
    """The first use of the package on this machine's engine, 0 for later ones."""
    decode_tps: float | None
    """(n - 1) / (t_last - t_first): tokens per second after the first. None for fewer than two tokens."""
    prompt_tokens: int
    """Positions of the prompt, with those of the images."""
    generated_tokens: int
    """Tokens of the answer, without the one that stopped it."""
    cold: bool
    """True for the first answer of a process, which must not be averaged with later ones."""
    cached_images: int = 0
    """Images that came from the feature cache or the prefix cache. `encode_ms` does not include them."""
    reused_tokens: int = 0
    """Positions of the prompt that came from the prefix cache. `prefill_ms` does not include them."""

    @property
    def ttft_ms(self) -> float:
        """The time to first token: the sum of its stages."""
        return sum(getattr(self, stage) for stage in TTFT_STAGES)

    def as_dict(self) -> dict[str, Any]:
        """Returns a dictionary for JSON, to a microsecond, with `ttft_ms` first."""
        values = {"ttft_ms": self.ttft_ms, **asdict(self)}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


class LapClock:
    """A clock of contiguous laps: each starts where the last one ended, so they add up to the whole time."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()

    def lap_ms(self) -> float:
        """Returns the time since the last lap, or since this clock was made, in milliseconds."""
        now = self._clock()
        elapsed, self._last = now - self._last, now
        return 1000 * elapsed
