"""Progress on stderr."""

from __future__ import annotations

import pytest

from fastvlm.cli.progress import CountProgress, RateProgress


def test_count_prints_tenths_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with CountProgress(40, "images") as progress:
        for n in range(40):
            progress.advance("1 failed" if n > 20 else "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("  1 of 40 images, 0 s")
    assert lines[-1].startswith("  40 of 40 images, 1 failed, ")


def test_rate_ends_with_the_whole_count(capsys: pytest.CaptureFixture[str]) -> None:
    with RateProgress(30, "images") as progress:
        for n in range(30):
            progress.advance("2 failed" if n > 20 else "")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("  1 of 30 images, ") and first.endswith(" left")
    assert last.startswith("  30 of 30 images, 2 failed, ") and last.endswith(" images/s")


def test_rate_of_nothing_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with RateProgress(None, "images"):
        pass
    assert capsys.readouterr().err == ""
