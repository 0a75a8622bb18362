"""`python -m fastvlm`"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_package_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvlm", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fastvlm ")
