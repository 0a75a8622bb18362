"""Comparisons of two benchmarks, and the statistics behind their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fastvlm.runtime.benchmark.comparison import arrangements, change, compare, mann_whitney, ratio_interval, student
from fastvlm.runtime.benchmark.report import Benchmark

STEADY = [[30.0, 30.4, 30.2, 30.6, 30.1], [30.3, 30.5, 30.2, 30.7, 30.0], [29.9, 30.2, 30.4, 30.1, 30.3]]
SLOWER = [[1.3 * value for value in one] for one in STEADY]


def test_only_the_slower_stage_is_reported(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    found = compare(benchmark_of(make(SLOWER)), benchmark_of(make(STEADY)))
    verdicts = {measure: one.verdict for measure, one in found.changes["model"].items()}
    assert verdicts["encode_ms"] == verdicts["ttft_ms"] == "slower"
    assert {verdicts[name] for name in ("preprocess_ms", "project_ms", "prefill_ms", "sample_ms", "ms_per_token")} == {
        "no difference seen"
    }
    assert 0.2 < found.slowdown < 0.25  # 9 of 42 ms
    assert found.warnings == ()


def test_faster_run_has_a_slowdown_of_0(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    found = compare(benchmark_of(make(STEADY)), benchmark_of(make(SLOWER)))
    assert found.changes["model"]["ttft_ms"].verdict == "faster"
    assert found.slowdown == 0.0


def test_other_differences_are_warnings(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    old = benchmark_of(make(), chip="Apple M1", threads="1")
    new = benchmark_of(make(image_size=512, folder={"path": "m", "trained": True, "source": {"name": "other"}}))
    new = replace(new, workload={**new.workload, "max_tokens": 9, "image": {"sha256": "1"}})
    warnings = compare(new, old).warnings
    assert "chip was Apple M1, is Apple M4" in warnings
    assert "threads was 1, is None" in warnings
    assert "max_tokens was 8, is 9" in warnings
    assert "the image is a different one" in warnings
    assert "model: image_size was 256, is 512" in warnings
    assert "model: the folder comes from a different checkpoint" in warnings


def test_configurations_are_matched_by_label(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    old = benchmark_of(make(label="a"), make(label="b"))
    found = compare(benchmark_of(make(label="b"), make(label="c")), old)
    assert list(found.changes) == ["b"]
    assert set(found.unmatched) == {"a", "c"}
    single = compare(benchmark_of(make(label="renamed")), benchmark_of(make(label="a")))
    assert list(single.changes) == ["renamed"]


def times(draw: np.random.Generator, factor: float, between: float, processes: int = 3) -> list[list[float]]:
    """Returns times of processes that differ by `between`, with runs that are up to about 3 % slower."""
    return [
        list(100 * factor * math.exp(between * draw.normal()) * np.exp(0.03 * np.abs(draw.normal(size=5))))
        for _ in range(processes)
    ]


@pytest.mark.parametrize("between", [0.0, 0.02, 0.05])
def test_unchanged_program_shows_no_difference(between: float) -> None:
    draw = np.random.default_rng(0)
    found = [change(times(draw, 1, between), times(draw, 1, between)) for _ in range(200)]
    wrong = sum(one is None or one.verdict != "no difference seen" for one in found)
    assert wrong <= 20  # a 95 % interval would be wrong 10 times, and 60 times with all runs taken as independent


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_changed_program_is_reported(factor: float, verdict: str) -> None:
    draw = np.random.default_rng(1)
    found = [change(times(draw, 1, 0.02), times(draw, factor, 0.02)) for _ in range(50)]
    assert sum(one is not None and one.verdict == verdict for one in found) >= 49


def test_one_process_is_too_few_for_a_verdict() -> None:
    found = change([[10.0] * 9], [[20.0] * 9, [20.0] * 9])
    assert found is not None
    assert (found.verdict, found.low, found.ratio) == ("too few runs", None, 2.0)


def test_four_runs_per_side_are_too_few_for_a_verdict() -> None:
    """Every run takes twice the time. With four runs per side, chance alone does that once in 35."""
    four = change([[10.0, 10.1], [10.2, 10.3]], [[20.0, 20.1], [20.2, 20.3]])
    assert four is not None and four.verdict == "too few runs"
    many = change([[10.0, 10.1], [10.2, 10.3]], [[20.0 + n / 100 for n in range(30)] for _ in range(2)])
    assert many is not None and many.verdict == "too few runs"
    five = change([[10.0, 10.1, 10.4], [10.2, 10.3]], [[20.0, 20.1, 20.4], [20.2, 20.3]])
    assert five is not None and five.verdict == "slower"


def test_change_below_one_percent_is_not_reported() -> None:
    old = [[100.0 + k / 1000 for k in range(5)] for _ in range(3)]
    found = change(old, [[1.009 * value for value in one] for one in old])
    assert found is not None and found.low is not None
    assert found.low > 1.008
    assert found.verdict == "no difference seen"


def test_times_of_zero_are_not_compared() -> None:
    assert change([[0.0, 0.0]], [[1.0, 1.0]]) is None
    assert change([], [[1.0]]) is None


def test_rank_test_counts_every_arrangement() -> None:
    """The references are all 252 orders of 5 and 5 runs, and the table of Mann and Whitney (U = 2 gives 0.032)."""
    assert sum(arrangements(5, 5)) == math.comb(10, 5)
    assert arrangements(2, 2) == [1, 1, 2, 1, 1]
    old = np.array([1.0, 2, 3, 4, 7])
    new = np.array([5.0, 6, 8, 9, 10])
    assert mann_whitney(old, new) == pytest.approx(2 * (1 + 1 + 2) / 252)
    assert mann_whitney(old, new) == mann_whitney(new, old)


def test_rank_test_approximates_with_ties() -> None:
    """The reference 0.118789 is of scipy's mannwhitneyu(..., method="asymptotic")."""
    found = mann_whitney(np.array([1.0, 1, 2, 3, 3, 4]), np.array([2.0, 3, 3, 4, 5, 5]))
    assert found == pytest.approx(0.118789, abs=1e-6)
    assert mann_whitney(np.ones(4), np.ones(4)) == 1.0


def test_interval_equals_the_hand_computed_one() -> None:
    """The log medians 0, 0.1 and 0.3, 0.4 have the difference 0.3 and the pooled deviation 0.0707. t(2) is 4.303."""
    old, new = ([np.exp([value]) for value in side] for side in ((0.0, 0.1), (0.3, 0.4)))
    interval = ratio_interval(old, new)
    assert interval is not None
    half = 4.303 * math.sqrt(0.005)
    assert interval == pytest.approx((math.exp(0.3 - half), math.exp(0.3 + half)))
    assert student(12) == pytest.approx(2.1788, rel=2e-3)
