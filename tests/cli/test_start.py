"""The first moments of a command."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

BEGIN = (
    "import sys, os, signal\n"
    "sys.argv = ['fastvlm', '--version']\n"
    "class Kill:\n"
    "    def find_spec(self, name, *rest):\n"
    "        if name == 'typer':\n"
    "            os.kill(os.getpid(), signal.{name})\n"
    "sys.meta_path.insert(0, Kill())\n"
    "from fastvlm.cli.start import main\n"
    "main()\n"
)
"""Sends the signal during the imports."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_imports_is_one_line(number: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN.format(name=number.name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "error: interrupted\n")


def test_entry_point_runs_the_command() -> None:
    code = "import sys; sys.argv = ['fastvlm', '--version']\nfrom fastvlm.cli.start import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fastvlm ")
