"""A short run of the soak of bulk runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_bulk_runs_lose_and_repeat_nothing() -> None:
    script = Path(__file__).with_name("soak_captions.py")
    command = [sys.executable, str(script), "--kills", "3", "--images", "200", "--kinds", "csv", "txt", "webdataset"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every key once") == 3
