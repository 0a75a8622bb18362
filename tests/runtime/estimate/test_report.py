"""The report of estimates."""

from __future__ import annotations

from fastvlm.runtime.estimate.chips import POINTS, chip_named
from fastvlm.runtime.estimate.report import chip_lines, estimate_lines
from fastvlm.runtime.estimate.roofline import (
    estimate,
    point_work,
)


def test_report_is_marked_as_an_estimate() -> None:
    text = "\n".join(estimate_lines([estimate(point_work(POINTS[1]), chip_named("M4"))]))
    assert text.startswith("An estimate")
    assert "not a measurement" in text
    assert "if M1 Pro" in text and "M1 Pro, left out" in text
    assert "A18 Pro" in "\n".join(chip_lines())
