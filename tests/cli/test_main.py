"""The `fastvlm` command: exit codes, and what reaches the terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def test_version_and_help(fastvlm: Callable, tmp_path: Path) -> None:
    assert fastvlm("--version", cwd=tmp_path).stdout.startswith("fastvlm 0.")
    help_text = fastvlm("--help", cwd=tmp_path).stdout
    assert all(command in help_text for command in ("export", "generate", "verify", "doctor"))


@pytest.mark.parametrize("words", [[], ["nonsense"], ["export", "--bits", "4"], ["generate", "x"], ["verify", "x"]])
def test_wrong_usage_exits_with_2(fastvlm: Callable, tmp_path: Path, words: list[str]) -> None:
    assert fastvlm(*words, cwd=tmp_path).returncode == 2


def test_untrusted_text_is_printed_without_escapes(fastvlm: Callable, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    manifest = json.loads((copy / "fastvlm.json").read_text())
    manifest["notes"] = ["\x1b[2J\x07 hello\nerror: forged " + "x" * 5000]
    (copy / "fastvlm.json").write_text(json.dumps(manifest))
    done = fastvlm("generate", copy, "-p", "hi", "--max-tokens", 1, cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert "\\x1b[2J" in line
    assert len(line) < 700
    assert not any(line.startswith("error") for line in done.stderr.splitlines())


def test_python_m_fastvlm_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvlm", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fastvlm ")


COMPLETED = {"bash": "complete_bash", "zsh": "complete_zsh", "fish": "complete_fish"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fastvlm ex", "export"),
        ("fastvlm export --quant pal", "pal8"),
        ("fastvlm export --decoder-q", "--decoder-quantizer"),
    ],
)
def test_completion_lists_commands_options_and_choices(tmp_path: Path, words: str, found: str) -> None:
    environment = {**os.environ, "_FASTVLM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    command = [Path(sys.executable).with_name("fastvlm")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found in done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_shown_for_a_shell(tmp_path: Path, shell: str) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [Path(sys.executable).with_name("fastvlm"), "--show-completion", shell]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "_FASTVLM_COMPLETE" in done.stdout
