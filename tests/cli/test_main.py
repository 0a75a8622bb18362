"""The `fastvlm` command: exit codes, what reaches the terminal, and `--help` of every command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from fastvlm.cli.main import Command, app, default_text

COMMANDS = typer.main.get_command(app).commands

IMPERATIVE = re.compile(r"(Also )?[A-Z][a-z]+ |With --[a-z-]+( [a-z]+)?, [a-z]+ |An? |A checkpoint|Exported")
"""The beginning of a help text: a verb, a condition and a verb, or, for an argument, a noun with its article."""

BANNED = re.compile(r"\b(anew|amid|beside|whoever|for want of|is no|gone on|goes on|told|stranger|of ours)\b|;")


def test_version_and_help(fastvlm: Callable, tmp_path: Path) -> None:
    assert fastvlm("--version", cwd=tmp_path).stdout.startswith("fastvlm 0.")
    help_text = fastvlm("--help", cwd=tmp_path).stdout
    assert all(command in help_text for command in ("export", "generate", "verify", "doctor"))


@pytest.mark.parametrize("words", [[], ["nonsense"], ["export", "--bits", "4"], ["generate", "x"], ["verify", "x"]])
def test_wrong_usage_exits_with_2(fastvlm: Callable, tmp_path: Path, words: list[str]) -> None:
    assert fastvlm(*words, cwd=tmp_path).returncode == 2


def test_untrusted_text_is_printed_without_escapes(here: Callable, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    manifest = json.loads((copy / "fastvlm.json").read_text())
    manifest["notes"] = ["\x1b[2J\x07 hello\nerror: forged " + "x" * 5000]
    (copy / "fastvlm.json").write_text(json.dumps(manifest))
    done = here("generate", copy, "-p", "hi", "--max-tokens", 1, cwd=tmp_path)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_shown_for_a_shell(tmp_path: Path, shell: str) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [Path(sys.executable).with_name("fastvlm"), "--show-completion", shell]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "_FASTVLM_COMPLETE" in done.stdout


def help_of(command: str, columns: int = 100) -> str:
    return CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(columns), "NO_COLOR": "1"}).output


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_flags_show_no_type(command: str) -> None:
    text = help_of(command)
    assert "--help" in text
    assert not re.search(r"<(bool|str|path|int|float|list\[str\])>", text), text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_texts_are_imperative_and_plain(command: str) -> None:
    assert COMMANDS[command].help
    texts = [parameter.help for parameter in COMMANDS[command].params]
    for text in [COMMANDS[command].help, *texts]:
        assert text and IMPERATIVE.match(text), text
        assert not BANNED.search(text), text
        assert text.split(" \\[default")[0].endswith("."), text


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("columns", [80, 100])
def test_no_word_is_broken_at_a_usual_width(command: str, columns: int) -> None:
    text = help_of(command, columns)
    assert max(map(len, text.splitlines())) <= columns
    for parameter in COMMANDS[command].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("--"):
                assert option in text


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        ("export", ("Encoder", "Decoder", "Package", "Output", "Safety")),
        ("generate", ("Sampling", "Model", "Output")),
        ("bench", ("Measuring", "Model", "Output")),
    ],
)
def test_options_are_grouped(command: str, panels: tuple[str, ...]) -> None:
    assert all(f"─ {panel} ─" in help_of(command) for panel in panels)


def test_default_is_shown_once_after_the_text() -> None:
    text = " ".join(help_of("generate").replace("│", " ").split())
    assert text.count("Stop after N tokens. [default: 256]") == 1
    assert "Set the sampling temperature. 0 is greedy. [default: 0]" in text
    assert "[default: the chat template's]" in text


@pytest.mark.parametrize(
    ("command", "required"), [("generate", ("FOLDER", "--prompt")), ("bundle", ("FOLDER", "--for")),
                              ("caption", ("--model", "--out")), ("verify", ("FOLDER",))],
)  # fmt: skip
def test_required_parameters_are_marked(command: str, required: tuple[str, ...]) -> None:
    for name in required:
        assert re.search(rf"\*\s+{name}\b", help_of(command)), name


def test_paragraphs_are_filled_to_the_width() -> None:
    command = Command("c", help="One line\nand the next.\n\nA second paragraph.")
    assert command.help == "One line and the next.\n\nA second paragraph."


def test_false_flag_has_no_default_text() -> None:
    flags = [parameter for parameter in COMMANDS["export"].params if parameter.name == "force"]
    assert [default_text(flag) for flag in flags] == [""]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['fastvlm', 'export', '--help']\n"
        "from fastvlm.cli.main import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'torch', 'mlx', 'coremltools', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
