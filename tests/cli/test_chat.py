"""`fastvlm chat` as a user types it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[2] / "runtime" / "samples"
FASTVLM = (sys.executable, "-m", "fastvlm.cli.main")


def run(*words: object, stdin: bytes = b"", cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*FASTVLM, *map(str, words)], cwd=cwd, capture_output=True, input=stdin, timeout=300)


def test_chat_follows_piped_lines(model: Path, tmp_path: Path) -> None:
    lines = f"What?\n\n/image {SAMPLES / 'word.png'}\nAnd this?\n/image gone.png\n/dance\n/reset\nWhat?\n/quit\nmore\n"
    words = ("chat", model, "-i", SAMPLES / "shapes.png", "--max-tokens", 4, "--temperature", 1, "--seed", 1)
    done = run(*words, stdin=lines.encode(), cwd=tmp_path)
    errors = done.stderr.decode()
    assert len(done.stdout.splitlines()) >= 3, errors
    assert errors.count("TTFT") == 3
    cached = [int(line.split(" cached")[0].split()[-1]) for line in errors.splitlines() if "TTFT" in line]
    assert cached[1] > cached[0] + 16  # the first picture and the history
    assert cached[2] <= cached[0]
    assert "gone.png does not exist" in errors
    assert "/dance is not a command. See /help" in errors
    assert "note: random weights" in errors
    assert "Traceback" not in errors
    assert done.returncode == 1  # two lines could not be followed


def test_full_context_is_reported(here: Callable, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tokenizer_model_max_length": 24}))
    (copy / "fastvlm.json").unlink()
    done = here("chat", copy, stdin="What?\nAnd?\n", cwd=tmp_path)
    errors = done.stderr
    assert "the context of 24 tokens is full. /reset starts a new conversation" in errors
    assert "error: the prompt takes" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert done.returncode == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(model: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*FASTVLM, "chat", str(model), "--max-tokens", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": 4096}  # the answer fills it, and waits
    with subprocess.Popen(command, cwd=tmp_path, stdin=theirs, **pipes) as process:
        os.write(ours, b"Tell me.\n")
        assert process.stdout.read(6)  # the answer has begun
        process.send_signal(signal.SIGINT)
        os.write(ours, b"/quit\n")  # read after the answer
        _, errors = process.communicate(timeout=300)
    os.close(ours)
    os.close(theirs)
    assert b"stopped: this question is not in the history" in errors
    assert b"TTFT" not in errors
    assert process.returncode == 0
