"""Verdicts: what an unchanged program shows is no difference, what a slower one shows is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvlm.runtime.benchmark.noise import arrangements, change, mann_whitney, ratio_interval, student


def times(draw: np.random.Generator, factor: float, between: float, processes: int = 3) -> list[list[float]]:
    """Of processes that differ by `between`, and runs that are late by some 3 % now and then."""
    return [
        list(100 * factor * math.exp(between * draw.normal()) * np.exp(0.03 * np.abs(draw.normal(size=5))))
        for _ in range(processes)
    ]


@pytest.mark.parametrize("between", [0.0, 0.02, 0.05])
def test_an_unchanged_program_shows_no_difference(between: float) -> None:
    draw = np.random.default_rng(0)
    found = [change(times(draw, 1, between), times(draw, 1, between)) for _ in range(200)]
    wrong = sum(one is None or one.verdict != "no difference seen" for one in found)
    assert wrong <= 20  # a 95 % interval would be wrong 10 times; all runs taken for independent, 60


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_changed_program_shows(factor: float, verdict: str) -> None:
    draw = np.random.default_rng(1)
    found = [change(times(draw, 1, 0.02), times(draw, factor, 0.02)) for _ in range(50)]
    assert sum(one is not None and one.verdict == verdict for one in found) >= 49


def test_one_process_is_too_few_to_tell() -> None:
    found = change([[10.0] * 9], [[20.0] * 9, [20.0] * 9])
    assert found is not None
    assert (found.verdict, found.low, found.ratio) == ("too few runs", None, 2.0)


def test_runs_whose_ranks_cannot_be_unlikely_are_too_few() -> None:
    """Twice the time in every run: with four on each side that happens by chance once in 35, whatever the times."""
    four = change([[10.0, 10.1], [10.2, 10.3]], [[20.0, 20.1], [20.2, 20.3]])
    assert four is not None and four.verdict == "too few runs"
    many = change([[10.0, 10.1], [10.2, 10.3]], [[20.0 + n / 100 for n in range(30)] for _ in range(2)])
    assert many is not None and many.verdict == "too few runs"
    five = change([[10.0, 10.1, 10.4], [10.2, 10.3]], [[20.0, 20.1, 20.4], [20.2, 20.3]])
    assert five is not None and five.verdict == "slower"


def test_a_change_below_one_percent_is_never_told() -> None:
    old = [[100.0 + k / 1000 for k in range(5)] for _ in range(3)]
    found = change(old, [[1.009 * value for value in one] for one in old])
    assert found is not None and found.low is not None
    assert found.low > 1.008
    assert found.verdict == "no difference seen"


def test_times_of_zero_are_not_compared() -> None:
    assert change([[0.0, 0.0]], [[1.0, 1.0]]) is None
    assert change([], [[1.0]]) is None


def test_rank_test_counts_every_arrangement() -> None:
    """Against a count of all 252 orders of 5 and 5 runs, and the table of Mann and Whitney: U = 2 gives 0.032."""
    assert sum(arrangements(5, 5)) == math.comb(10, 5)
    assert arrangements(2, 2) == [1, 1, 2, 1, 1]
    old = np.array([1.0, 2, 3, 4, 7])
    new = np.array([5.0, 6, 8, 9, 10])
    assert mann_whitney(old, new) == pytest.approx(2 * (1 + 1 + 2) / 252)
    assert mann_whitney(old, new) == mann_whitney(new, old)


def test_rank_test_approximates_with_ties() -> None:
    """scipy's mannwhitneyu(..., method="asymptotic") gives 0.118789."""
    found = mann_whitney(np.array([1.0, 1, 2, 3, 3, 4]), np.array([2.0, 3, 3, 4, 5, 5]))
    assert found == pytest.approx(0.118789, abs=1e-6)
    assert mann_whitney(np.ones(4), np.ones(4)) == 1.0


def test_interval_is_students() -> None:
    """Two processes each, log medians 0 and 0.1, 0.3 and 0.4: difference 0.3, pooled deviation 0.0707, t(2) 4.303."""
    old, new = ([np.exp([value]) for value in side] for side in ((0.0, 0.1), (0.3, 0.4)))
    interval = ratio_interval(old, new)
    assert interval is not None
    half = 4.303 * math.sqrt(0.005)
    assert interval == pytest.approx((math.exp(0.3 - half), math.exp(0.3 + half)))
    assert student(12) == pytest.approx(2.1788, rel=2e-3)
