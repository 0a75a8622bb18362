"""How long an answer should take on a chip: an estimate, and marked as one wherever it is shown.

    encode  = max(FLOPs / (efficiency x engine's peak), (weights + activations) / bandwidth)
    prefill = max(FLOPs / (efficiency x GPU's peak), weights / bandwidth)
    TTFT    = overhead + encode + prefill

Peaks and bandwidths are those of `chips.py`. The efficiency (one for both, because four sums cannot tell two apart)
and the overhead (of starting both, the same on every chip) are fitted on the published points (`published.py`), in
logarithms, once for each of the three chips that the published machine may have had: the estimate is that for the
middle one, and the range is what all three give. Activations are counted as if every one went to memory and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from ...models.config import FastVLMConfig
from ...models.fastvit_config import FastViTConfig
from .chips import Chip, chip_named
from .published import CANDIDATES, POINTS, Point
from .work import Work, architecture_work

EFFICIENCIES = np.arange(0.05, 1.0, 0.005)
OVERHEADS_MS = np.arange(0.0, 40.0, 0.25)
"""What is tried in the fit."""

PUBLISHED_BITS = 16.0
"""Per weight: Apple's exported 0.5B is float16."""


@dataclass(frozen=True)
class Calibration:
    """What a fit on published points says, if their machine had this chip."""

    chip: str
    efficiency: float
    overhead_ms: float


@dataclass(frozen=True)
class Estimate:
    """Milliseconds that were not measured."""

    label: str
    chip: str
    image_size: int
    prompt_tokens: int
    encode_ms: float
    prefill_ms: float
    overhead_ms: float
    low_ms: float
    high_ms: float
    """TTFT by the calibrations that give the least and the most."""
    most_tps: float
    """Tokens per second that the memory's bandwidth allows at most."""

    @property
    def ttft_ms(self) -> float:
        return self.encode_ms + self.prefill_ms + self.overhead_ms

    def as_dict(self) -> dict[str, Any]:
        return {"estimate": True, "ttft_ms": self.ttft_ms, **asdict(self)}


def estimate(work: Work, chip: Chip) -> Estimate:
    """`work` on `chip`."""
    by_calibration = [parts(work, chip, calibration) for calibration in calibrations()]
    encode, prefill, overhead = by_calibration[len(CANDIDATES) // 2]
    totals = [sum(one) for one in by_calibration]
    return Estimate(
        work.label, chip.name, work.image_size, work.prompt_tokens, encode, prefill, overhead, min(totals), max(totals),
        most_tps=chip.memory_gbps * 1e9 / work.decoder_bytes,
    )  # fmt: skip


def parts(work: Work, chip: Chip, calibration: Calibration) -> tuple[float, float, float]:
    """(encode, prefill, overhead) in milliseconds."""
    encode, prefill = (float(one) for one in roofline(work, chip, np.float64(calibration.efficiency)))
    return encode, prefill, calibration.overhead_ms


def roofline(work: Work, chip: Chip, efficiency: Any) -> tuple[Any, Any]:
    """(encode, prefill) in milliseconds, for one efficiency or an array of them."""
    engine = chip.engine_int8_tops if work.encoder.int8_activations else chip.engine_tflops
    bandwidth = chip.memory_gbps * 1e6  # bytes per millisecond
    encode = np.maximum(work.encoder.flops / (efficiency * engine * 1e9), work.encoder.moved_bytes / bandwidth)
    prefill = np.maximum(work.prefill_flops / (efficiency * chip.gpu_tflops * 1e9), work.decoder_bytes / bandwidth)
    return encode, prefill


@cache
def calibrations() -> tuple[Calibration, ...]:
    """On all published points, for each chip that their machine may have had."""
    return tuple(fit(POINTS, chip_named(name)) for name in CANDIDATES)


def fit(points: Sequence[Point], chip: Chip) -> Calibration:
    """Efficiency and overhead with the least squared error of logarithms."""
    errors = np.zeros((len(EFFICIENCIES), len(OVERHEADS_MS)))
    for point in points:
        encode, prefill = roofline(point_work(point), chip, EFFICIENCIES)
        predicted = (encode + prefill)[:, None] + OVERHEADS_MS
        errors += np.log(predicted / point.ttft_ms) ** 2
    best = np.unravel_index(errors.argmin(), errors.shape)
    return Calibration(chip.name, float(EFFICIENCIES[best[0]]), float(OVERHEADS_MS[best[1]]))


@dataclass(frozen=True)
class Check:
    """A published point next to what the roofline gives for it: shares, 0.05 is 5 % too much."""

    point: Point
    calibration: Calibration
    fitted: float
    left_out: float
    """With a fit that did not know the point."""


def checks() -> tuple[Check, ...]:
    """Every published point, for every chip that its machine may have had."""
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
    """The 0.5B in float16, at the point's size."""
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
    """Of the 0.5B."""
    from ...models.random_checkpoint import DECODERS, apple_config

    return FastVLMConfig.from_dict(apple_config(DECODERS["0.5b"], FastViTConfig().out_channels, 1024, 0))
