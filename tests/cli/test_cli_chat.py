"""`fastvlm chat` and `generate --images`, as a user types them."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.cli.progress import CountProgress

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
    known = [int(line.split(" known")[0].split()[-1]) for line in errors.splitlines() if "TTFT" in line]
    assert known[1] > known[0] + 16  # the first picture and the history
    assert known[2] <= known[0]
    assert "gone.png does not exist" in errors
    assert "/dance is no command: see /help" in errors
    assert "note: random weights" in errors
    assert "Traceback" not in errors
    assert done.returncode == 1  # two lines could not be followed


def test_chat_says_when_the_context_is_full(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tokenizer_model_max_length": 24}))
    (copy / "fastvlm.json").unlink()
    done = run("chat", copy, stdin=b"What?\nAnd?\n", cwd=tmp_path)
    errors = done.stderr.decode()
    assert "the context of 24 tokens is full: /reset begins anew" in errors
    assert "error: the prompt takes" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("stdin", "told"), [(b"a" * (2**20 + 2), "on stdin is longer than 1,048,576 bytes"), (b"\xff\xfe", "is not UTF-8")]
)
def test_stdin_that_is_no_prompt_is_told(model: Path, tmp_path: Path, stdin: bytes, told: str) -> None:
    done = run("generate", model, "-p", "-", stdin=stdin, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: the prompt on stdin")
    assert told in done.stderr.decode()
    done = run("chat", model, stdin=stdin, cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr.decode().splitlines()[-1]


def test_ctrl_c_in_a_terminal_ends_the_answer_and_not_the_chat(model: Path, tmp_path: Path) -> None:
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


def caption(model: Path, folder: Path, out: Path, *words: object) -> subprocess.CompletedProcess:
    given = ("generate", model, "--images", folder, "-p", "What?", "--out", out, "--max-tokens", 4, "--ignore-eos")
    return run(*given, *words, cwd=out.parent)


def test_folder_is_captioned_and_gone_on_with(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out.jsonl"
    folder.mkdir()
    for name in ("number.png", "shapes.png"):
        shutil.copy(SAMPLES / name, folder)
    first = caption(model, folder, out)
    assert first.returncode == 0, first.stderr
    assert b"2 images in" in first.stderr
    (folder / "broken.png").write_bytes(b"x")
    shutil.copy(SAMPLES / "word.png", folder)
    second = caption(model, folder, out, "--batch-size", 1)
    assert second.returncode == 1
    assert b"broken.png is no image in a format" in second.stderr
    assert b"4 images in" in second.stderr
    assert b"2 of them from an earlier run" in second.stderr
    assert b"1 of 4 images have no caption" in second.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == ["number.png", "shapes.png", "broken.png", "word.png"]
    other = caption(model, folder, out, "--seed", 3)
    assert (other.returncode, other.stdout) == (1, b"")
    assert b"another model, prompt or options" in other.stderr
    wrong = caption(model, folder, out, "--json")
    assert wrong.returncode == 2


def test_progress_is_told_in_tenths_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with CountProgress(40, "images") as progress:
        for n in range(40):
            progress.advance("1 failed" if n > 20 else "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("  1 of 40 images, 0 s")
    assert lines[-1].startswith("  40 of 40 images, 1 failed, ")
