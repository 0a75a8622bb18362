"""A few kills of the soak in every full run of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("soak_orphans.py")


@pytest.mark.slow
def test_killed_programs_leave_no_process_and_no_file() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "6"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("6 kills, 0 orphans, 0 files")
