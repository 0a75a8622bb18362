"""The command line in a process of its own and in this one, and a model to try it on."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastvlm.cli import main

START = ("-m", "fastvlm.cli.main")


def run(*words: object, cwd: Path, stdin: str = "", start: Sequence[str] = START) -> subprocess.CompletedProcess:
    """Runs `fastvlm` as a user does. `start` is what follows `python`."""
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=stdin, timeout=300)


def run_here(*words: object, cwd: Path, stdin: str | bytes = "") -> subprocess.CompletedProcess:
    """Runs `fastvlm` in this process, which has the imports already. Streams and signals are not those of a user."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace") for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["fastvlm", *map(str, words)])
        for name, stream in (("stdin", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ending:
            main._run()
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(words, ending.value.code or 0, *printed)


@pytest.fixture(scope="session")
def here() -> Callable[..., subprocess.CompletedProcess]:
    """`here(*words, cwd=...)`: the same without a process. Each command has a test with `fastvlm` too."""
    return run_here


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
def model(random_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported `random:tiny` in a folder of its own. Tests that change it copy it."""
    return Path(shutil.copytree(random_tiny, tmp_path_factory.mktemp("cli") / "model"))
