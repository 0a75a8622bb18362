"""What repeated measurements come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Of `n` measurements; percentiles are interpolated, so that with few measurements p99 is close to the largest."""

    n: int
    min: float
    p50: float
    p90: float
    p99: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def spread_of(values: Sequence[float]) -> Spread | None:
    """None where there is nothing to tell of."""
    if not values:
        return None
    lowest, *percentiles = np.percentile(np.asarray(values, np.float64), [0, 50, 90, 99])
    return Spread(len(values), float(lowest), *map(float, percentiles))
