"""What the commands are tried on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported `random:tiny`; tests that change a folder copy it."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "fastvlm.cli.main", "export", "random:tiny", "-o", "model"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "model"
