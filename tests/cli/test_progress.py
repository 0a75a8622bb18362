"""Progress on stderr."""

from __future__ import annotations

import pytest

from fastvlm.cli.progress import CountProgress


def test_count_prints_tenths_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with CountProgress(40, "images") as progress:
        for n in range(40):
            progress.advance("1 failed" if n > 20 else "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("  1 of 40 images, 0 s")
    assert lines[-1].startswith("  40 of 40 images, 1 failed, ")
