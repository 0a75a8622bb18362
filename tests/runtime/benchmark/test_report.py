"""The figures of a report."""

from __future__ import annotations

import pytest

from fastvlm.runtime.benchmark.report import Run, spread_of


def test_unaccounted_time_is_without_stages_and_decoding() -> None:
    run = Run(1, 2, 3, 4, 5, decode_tps=100.0, generated_tokens=3, answer_ms=40.0)
    assert run.ttft_ms == 15
    assert run.unaccounted_ms == pytest.approx(40 - 15 - 20)


def test_spread_interpolates() -> None:
    found = spread_of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.n, found.min, found.p50, found.p90) == (5, 1.0, 3.0, 4.6)
    assert spread_of([]) is None
