"""Statistics against chance: intervals of accuracies, and a test of paired changes."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of an accuracy measured on n questions (Wilson 1927).

    For metrics with partial credit the interval is a little too wide, as 0 and 1 are the scores that vary most.
    """
    if n == 0:
        return 0.0, 1.0
    spread = Z95**2 / n
    centre = (accuracy + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(accuracy * (1 - accuracy) / n + spread / (4 * n))
    # keeps the accuracy inside despite rounding
    return max(0.0, min(accuracy, centre - half)), min(1.0, max(accuracy, centre + half))


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided p-value of a split at least as uneven, if chance alone changed the scores.

    For scores of 0 and 1 this is McNemar's exact test.
    """
    n, fewer = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    # in logarithms, as 2**-n underflows after a thousand changes
    tail = sum(math.exp(_log_choose(n, k) - n * math.log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
