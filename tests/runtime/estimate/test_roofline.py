"""The roofline: its error on the published times, and its bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvlm.runtime.estimate.chips import CANDIDATES, CHIPS, POINTS, chip_named
from fastvlm.runtime.estimate.roofline import (
    Calibration,
    checks,
    estimate,
    parts,
    point_work,
    roofline,
)


def test_error_on_every_published_point_is_small(tolerance: Callable[[str], float]) -> None:
    found = checks()
    assert len(found) == len(CANDIDATES) * len(POINTS)
    for one in found:
        assert abs(one.fitted) < tolerance("estimate_fitted"), one
        assert abs(one.left_out) < tolerance("estimate_left_out"), one


def test_larger_chips_are_faster_and_in_range() -> None:
    work = point_work(POINTS[-1])
    found = {chip.name: estimate(work, chip) for chip in CHIPS}
    for one in found.values():
        assert one.low_ms <= one.ttft_ms <= one.high_ms
        assert one.encode_ms > 0 and one.prefill_ms > 0
    for family in ("M1", "M2", "M3", "M4", "M5"):
        assert found[f"{family} Max"].ttft_ms < found[f"{family} Pro"].ttft_ms < found[family].ttft_ms
    # the published machine, by the fit that took it for this chip
    assert found["M1 Pro"].ttft_ms == pytest.approx(POINTS[-1].ttft_ms, rel=0.1)


def test_memory_bounds_times_where_arithmetic_does_not() -> None:
    work, chip = point_work(POINTS[0]), chip_named("M1")
    _, prefill = roofline(work, chip, 1000.0)
    assert prefill == pytest.approx(work.decoder_bytes / 68.2e6)
    encode, _, overhead = parts(work, chip, Calibration("M1", 0.5, 7.0))
    assert encode == pytest.approx(work.encoder.moved_bytes / 68.2e6)
    work = point_work(POINTS[-1])
    encode, _, overhead = parts(work, chip, Calibration("M1", 0.5, 7.0))
    assert encode == pytest.approx(work.encoder.flops / (0.5 * 11e9))
    assert overhead == 7.0
