"""Intervals and p-values against published values and values computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.runtime.evaluation.significance import sign_test, wilson_interval

ANY_SPEED = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_examples(right: int, n: int, low: float, high: float) -> None:
    """The examples of Newcombe 1998, table I, method 3."""
    assert wilson_interval(right / n, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@ANY_SPEED
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_contains_the_accuracy_and_narrows(n: int, accuracy: float) -> None:
    low, high = wilson_interval(accuracy, n)
    assert 0 <= low <= accuracy <= high <= 1
    wider = wilson_interval(accuracy, max(1, n // 2))
    assert wider[1] - wider[0] >= high - low
    assert wilson_interval(0.0, n)[0] == 0.0
    assert wilson_interval(1.0, n)[1] == 1.0


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (2, 10, 2 * (1 + 12 + 66) / 2**12), (7, 7, 1.0)],
)
def test_sign_test_equals_hand_computed_values(better: int, worse: int, expected: float) -> None:
    assert sign_test(better, worse) == pytest.approx(expected)
    assert sign_test(worse, better) == pytest.approx(expected)


def test_sign_test_of_thousands_stays_in_range() -> None:
    assert 0 < sign_test(900, 1100) < 1e-5
    assert sign_test(5000, 5000) == pytest.approx(1.0, abs=0.01)
