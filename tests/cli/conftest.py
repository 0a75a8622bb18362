"""The command line in a process of its own, and a model to try it on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

START = ("-m", "fastvlm.cli.main")


def run(*words: object, cwd: Path, stdin: str = "", start: Sequence[str] = START) -> subprocess.CompletedProcess:
    """Runs `fastvlm` as a user does. `start` is what follows `python`."""
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=stdin, timeout=300)


@pytest.fixture(scope="session")
def fastvlm() -> Callable[..., subprocess.CompletedProcess]:
    """`fastvlm(*words, cwd=...)`: the finished command, with its output as text."""
    return run


@pytest.fixture(scope="session")
def one_line_error() -> Callable[..., None]:
    """`one_line_error(done, *parts)`: checks that a command ended in one error line with these parts."""

    def check(done: subprocess.CompletedProcess, *parts: str) -> None:
        assert done.returncode == 1, done
        assert done.stdout == ""
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in done.stderr
        for part in parts:
            assert part in last

    return check


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported `random:tiny`. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("cli")
    done = run("export", "random:tiny", "-o", "model", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "model"
