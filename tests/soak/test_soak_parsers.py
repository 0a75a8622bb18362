"""The readers of the soak, on undamaged files: they must follow the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
READ = """
import sys
from pathlib import Path
from soak.inputs import make_inputs
from soak.parsers import parsers
folder = Path(sys.argv[1])
for index, parser in enumerate(parsers(*make_inputs(folder, None, None))):
    place = folder / f"place-{index}"
    parser.prepare(place)
    parser.read(place)
print("all", index + 1)
"""
"""A program for a separate process, since some readers are commands, which install signal handlers."""


def test_every_parser_of_the_soak_reads_undamaged_files(tmp_path: Path) -> None:
    alone = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30
