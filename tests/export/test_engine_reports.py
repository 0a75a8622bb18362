"""The table of what is reported of each stored form, in the code, in the notes of exports, and in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvlm.export.engine_reports import REPORTS, engine_notes, report_of
from fastvlm.export.recipe import DEPLOYMENT_TARGETS, SCHEMES_FROM_IOS18
from fastvlm.quant.encoder_scheme import DEFAULT_SCHEME, MIXED
from fastvlm.quant.schemes import ENCODER_SCHEMES, PALETTE_BITS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


@pytest.mark.parametrize("min_os", DEPLOYMENT_TARGETS)
def test_every_form_of_an_export_has_one_report(min_os: str) -> None:
    possible = set(ENCODER_SCHEMES) - {MIXED} - (SCHEMES_FROM_IOS18 if min_os == "ios17" else set())
    for scheme in possible:
        assert sum(scheme in report.schemes and min_os in report.min_os for report in REPORTS) == 1


def test_wrong_forms_have_a_source_and_an_alternative() -> None:
    for report in REPORTS:
        assert report.source.startswith("https://")
        assert bool(report.advice) == (report.state != "agrees")


def test_default_export_has_no_note() -> None:
    assert engine_notes({DEFAULT_SCHEME}, "ios17") == ()
    assert report_of(DEFAULT_SCHEME, "ios17").state == "agrees"


@pytest.mark.parametrize("scheme", PALETTE_BITS)
def test_palettes_for_ios18_are_noted(scheme: str) -> None:
    (note,) = engine_notes({scheme, "fp16"}, "ios18")
    assert "ios18: computed here, not seen on the engine" in note
    assert "\n" not in note


def test_mixed_plan_has_the_notes_of_its_weights() -> None:
    assert engine_notes({MIXED, "int8", "pal4"}, "ios17") == engine_notes({"pal4"}, "ios17") != ()


def test_page_has_every_report() -> None:
    rows = [re.split(r" *\| *", line.strip("| ")) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {(cells[0].replace("`", ""), cells[1], cells[2]) for cells in rows if len(cells) >= 4}
    for report in REPORTS:
        systems = "" if len(report.min_os) > 1 else f", {report.min_os[0]}"
        assert (", ".join(report.schemes) + systems, report.form, report.state) in found
    assert all(report.source in PAGE.read_text() for report in REPORTS)
