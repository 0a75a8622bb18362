"""Whether two sets of repeated measurements differ by more than noise.

Runs of one process are more alike than runs of two: memory is laid out anew, clocks and neighbours change. A test
that takes all runs for independent would call every second repetition of an unchanged program a difference. Two tests
have to agree here, and a difference below 1 % is never told:

- the 95 % interval of the ratio, from the medians of the processes in logarithms (Student 1908, pooled variance),
  leaves out 1;
- the ranks of all runs (Mann and Whitney 1947, two-sided) are unlikely under no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..evaluation.significance import Z95

Verdict = Literal["faster", "slower", "no difference seen", "too few runs"]

LEVEL = 0.01
"""Of the rank test: several stages are tested at once."""

FLOOR = 0.01
"""Smaller changes are never told: clocks and schedulers do not repeat better."""

MIN_PROCESSES = 2
"""Of each side: one process says nothing of what the next would show."""

MIN_RUNS = 5
"""Of each side: among fewer, no ranks are unlikely enough for LEVEL."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""97.5 % quantiles of Student's distribution for 1 to 8 degrees of freedom."""

MAX_EXACT = 2000
"""Pairs of runs up to which the rank test counts arrangements instead of approximating them."""


@dataclass(frozen=True)
class Change:
    """Two sets of times next to each other."""

    old: float
    new: float
    """Medians of all runs."""
    low: float | None
    high: float | None
    """95 % interval of new / old; None with too few processes to tell."""
    p: float
    """Of the rank test."""
    verdict: Verdict

    @property
    def ratio(self) -> float:
        return self.new / self.old

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def change(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Change | None:
    """Of times, where less is better, each side by process; None where a side has no time above 0."""
    sides = [[np.asarray(one, np.float64) for one in side if len(one)] for side in (old, new)]
    if not all(sides) or not all(np.median(one) > 0 for side in sides for one in side):
        return None
    before, after = (np.concatenate(side) for side in sides)
    interval, p = ratio_interval(*sides), mann_whitney(before, after)
    low, high = interval or (None, None)
    medians = float(np.median(before)), float(np.median(after))
    judged = interval if enough(len(before), len(after)) else None
    return Change(*medians, low, high, p, verdict(medians[1] / medians[0], judged, p))


def enough(old: int, new: int) -> bool:
    """Whether so many runs of each side can be judged."""
    return min(old, new) >= MIN_RUNS


def verdict(ratio: float, interval: tuple[float, float] | None, p: float) -> Verdict:
    if interval is None:
        return "too few runs"
    if interval[0] <= 1 <= interval[1] or p > LEVEL or abs(math.log(ratio)) < FLOOR:
        return "no difference seen"
    return "faster" if ratio < 1 else "slower"


def ratio_interval(
    old: Sequence[NDArray[np.float64]], new: Sequence[NDArray[np.float64]]
) -> tuple[float, float] | None:
    """95 % interval of new / old from the medians of the processes; None unless each side has two."""
    sides = [np.log([np.median(one) for one in side]) for side in (old, new)]
    if min(map(len, sides)) < MIN_PROCESSES:
        return None
    freedom = sum(map(len, sides)) - 2
    variance = sum(((side - side.mean()) ** 2).sum() for side in sides) / freedom
    half = student(freedom) * math.sqrt(variance * sum(1 / len(side) for side in sides))
    difference = sides[1].mean() - sides[0].mean()
    return math.exp(difference - half), math.exp(difference + half)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, to 0.2 % (beyond the table: Cornish and Fisher's expansion)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mann_whitney(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Two-sided p-value of the ranks: exact for few runs without ties, else the normal approximation."""
    less = (new[:, None] < old[None, :]).sum() + 0.5 * (new[:, None] == old[None, :]).sum()
    n, m = len(old), len(new)
    values, counts = np.unique(np.concatenate([old, new]), return_counts=True)
    if len(values) == n + m and n * m <= MAX_EXACT:
        ways = arrangements(n, m)
        tail = int(min(less, n * m - less))
        return min(1.0, 2 * sum(ways[: tail + 1]) / sum(ways))
    total = n + m
    ties = (counts**3 - counts).sum() / (total * (total - 1))
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties))
    if deviation == 0:
        return 1.0
    z = (abs(less - n * m / 2) - 0.5) / deviation
    return min(1.0, math.erfc(max(z, 0.0) / math.sqrt(2)))


def arrangements(n: int, m: int) -> list[int]:
    """In how many orders of n and m runs u pairs are inverted, for u from 0 to n * m: a Gaussian binomial."""
    counts = [1]
    for k in range(1, m + 1):  # times (1 - x^(n+k)) / (1 - x^k)
        counts = counts + [0] * n
        for u in range(len(counts) - 1, n + k - 1, -1):
            counts[u] -= counts[u - n - k]
        for u in range(k, len(counts)):
            counts[u] += counts[u - k]
    return counts
