"""The roofline: the estimated time to first token on a chip.

    encode  = max(FLOPs / (efficiency x engine's peak), (weights + activations) / bandwidth)
    prefill = max(FLOPs / (efficiency x GPU's peak), weights / bandwidth)
    TTFT    = overhead + encode + prefill

Peaks, bandwidths and published points are in `chips.py`. The efficiency and the overhead are fitted on the published
points, in logarithms. One efficiency serves both parts, because four sums cannot separate two. The overhead, of
starting both parts, is taken as equal on every chip. The fit is made once for each of the three chips that the
published machine may have had. The estimate is from the middle one, and the range is over all three. Activations are
counted as if each were written to memory and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from ...models.config import FastVLMConfig
from ...models.fastvit_config import FastViTConfig
from .chips import CANDIDATES, POINTS, Chip, Point, chip_named
from .work import Work, architecture_work

EFFICIENCIES = np.arange(0.05, 1.0, 0.005)
OVERHEADS_MS = np.arange(0.0, 40.0, 0.25)
"""The grids of efficiencies and overheads in the fit."""

PUBLISHED_BITS = 16.0
"""The bits per weight of the published model, Apple's 0.5B in float16."""


@dataclass(frozen=True)
class Calibration:
    """The result of a fit on the published points, if their machine had this chip."""

    chip: str
    efficiency: float
    overhead_ms: float


@dataclass(frozen=True)
class Estimate:
    """Estimated times in milliseconds."""

    label: str
    chip: str
    image_size: int
    prompt_tokens: int
    encode_ms: float
    prefill_ms: float
    overhead_ms: float
    low_ms: float
    high_ms: float
    """The smallest and the largest TTFT over the calibrations."""
    most_tps: float
    """The upper bound of tokens per second by the memory's bandwidth."""

    @property
    def ttft_ms(self) -> float:
        """The time to first token."""
        return self.encode_ms + self.prefill_ms + self.overhead_ms

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of a report's `estimates`."""
        return {"estimate": True, "ttft_ms": self.ttft_ms, **asdict(self)}


def estimate(work: Work, chip: Chip) -> Estimate:
    """Returns the estimate for `work` on `chip`."""
    by_calibration = [parts(work, chip, calibration) for calibration in calibrations()]
    encode, prefill, overhead = by_calibration[len(CANDIDATES) // 2]
    totals = [sum(one) for one in by_calibration]
    return Estimate(
        work.label, chip.name, work.image_size, work.prompt_tokens, encode, prefill, overhead, min(totals), max(totals),
        most_tps=chip.memory_gbps * 1e9 / work.decoder_bytes,
    )  # fmt: skip


def parts(work: Work, chip: Chip, calibration: Calibration) -> tuple[float, float, float]:
    """Returns (encode, prefill, overhead) in milliseconds."""
    encode, prefill = (float(one) for one in roofline(work, chip, np.float64(calibration.efficiency)))
    return encode, prefill, calibration.overhead_ms


def roofline(work: Work, chip: Chip, efficiency: Any) -> tuple[Any, Any]:
    """Returns (encode, prefill) in milliseconds, for one efficiency or an array of them."""
    engine = chip.engine_int8_tops if work.encoder.int8_activations else chip.engine_tflops
    bandwidth = chip.memory_gbps * 1e6  # bytes per millisecond
    encode = np.maximum(work.encoder.flops / (efficiency * engine * 1e9), work.encoder.moved_bytes / bandwidth)
    prefill = np.maximum(work.prefill_flops / (efficiency * chip.gpu_tflops * 1e9), work.decoder_bytes / bandwidth)
    return encode, prefill


@cache
def calibrations() -> tuple[Calibration, ...]:
    """Returns the fit on all published points, for each possible chip of their machine."""
    return tuple(fit(POINTS, chip_named(name)) for name in CANDIDATES)


def fit(points: Sequence[Point], chip: Chip) -> Calibration:
    """Returns the efficiency and overhead with the least squared error of logarithms."""
    errors = np.zeros((len(EFFICIENCIES), len(OVERHEADS_MS)))
    for point in points:
        encode, prefill = roofline(point_work(point), chip, EFFICIENCIES)
        predicted = (encode + prefill)[:, None] + OVERHEADS_MS
        errors += np.log(predicted / point.ttft_ms) ** 2
    best = np.unravel_index(errors.argmin(), errors.shape)
    return Calibration(chip.name, float(EFFICIENCIES[best[0]]), float(OVERHEADS_MS[best[1]]))


@dataclass(frozen=True)
class Check:
    """The errors of the roofline on a published point, as shares of its time (0.05 is 5 % too much)."""

    point: Point
    calibration: Calibration
    fitted: float
    left_out: float
    """The error of a fit without the point."""


def checks() -> tuple[Check, ...]:
    """Returns the check of every published point, for every possible chip of its machine."""
    found = []
    for name, calibration in zip(CANDIDATES, calibrations(), strict=True):
        chip = chip_named(name)
        for point in POINTS:
            others = fit([one for one in POINTS if one != point], chip)
            errors = [sum(parts(point_work(point), chip, one)) / point.ttft_ms - 1 for one in (calibration, others)]
            found.append(Check(point, calibration, *errors))
    return tuple(found)


@cache
def point_work(point: Point) -> Work:
    """Returns the work of the 0.5B in float16, at the point's size."""
    return architecture_work(
        point.label,
        published_config(),
        FastViTConfig(),
        image_size=point.image_size,
        encoder_bits=PUBLISHED_BITS,
        decoder_bits=PUBLISHED_BITS,
    )


@cache
def published_config() -> FastVLMConfig:
    """Returns the config of the 0.5B."""
    from ...models.random_checkpoint import DECODERS, apple_config

    return FastVLMConfig.from_dict(apple_config(DECODERS["0.5b"], FastViTConfig().out_channels, 1024, 0))
