"""The chips: their names and sources."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.runtime.estimate.chips import CHIPS, SOURCES, chip_named


def test_chip_is_found_by_any_spelling() -> None:
    assert chip_named("Apple M4 Pro") is chip_named("m4pro") is chip_named("M4-Pro")
    with pytest.raises(UsageError, match=r"unknown chip 'M9'\. Available: M1, M1 Pro"):
        chip_named("M9")


def test_every_figure_of_a_chip_has_a_source() -> None:
    for chip in CHIPS:
        assert all(source in SOURCES for source in chip.sources)
        assert chip.engine_int8_tops >= chip.engine_tflops > 0
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert {source for chip in CHIPS for source in chip.sources} == set(SOURCES)
