"""`fastvlm inspect` as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def test_package_is_described_and_linted(
    fastvlm: Callable, here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    done = fastvlm("inspect", model, cwd=tmp_path)
    assert done.returncode == 0
    assert "images fp32[1, 3, 256, 256]" in done.stdout
    assert "int8 affine" in done.stdout
    report = json.loads(here("inspect", model / "fastvithd.mlpackage", "--json", cwd=tmp_path).stdout)
    assert report["operations"]["conv"] == 46
    for missing in ("gone", "gone.mlpackage", "gone.aimodel"):
        one_line_error(here("inspect", missing, cwd=tmp_path), f"{missing} does not exist")
    if sys.platform != "darwin":
        one_line_error(here("inspect", model, "--placement", cwd=tmp_path), "only macOS can tell")
