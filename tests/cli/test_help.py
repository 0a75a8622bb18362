"""`--help` of every command, as rendered."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from fastvlm.cli.help import Command, default_text
from fastvlm.cli.main import app

COMMANDS = typer.main.get_command(app).commands

IMPERATIVE = re.compile(r"(Also )?[A-Z][a-z]+ |With --[a-z-]+( [a-z]+)?, [a-z]+ |An? |A checkpoint|Exported")
"""The beginning of a help text: a verb, a condition and a verb, or, for an argument, a noun with its article."""

BANNED = re.compile(r"\b(anew|amid|beside|whoever|for want of|is no|gone on|goes on|told|stranger|of ours)\b|;")


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
                              ("caption", ("DIR", "--model", "--out")), ("verify", ("FOLDER",))],
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
