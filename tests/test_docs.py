"""README and docs: their blocks run, their commands and options exist, and the parts made from the code are current."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from fastvlm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
WITH_BLOCKS = [page for page in PAGES if re.search(r"^```(sh|python)$", page.read_text(), re.MULTILINE)]
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
SECONDARY = {option for command in COMMANDS.values() for param in command.params for option in param.secondary_opts}
OTHERS = {"--help", "--version", "--install-completion", "--show-completion", "--hypothesis-profile"}
"""Options that no command declares: typer's own, and those of other programs."""

GONE = {"--vision", "--layout", "--target", "--to"}
"""Former options. Only CHANGELOG.md may have them."""


def blocks(page: Path, languages: str) -> Iterator[tuple[str, str]]:
    """Yields (language, code) of a page's fenced blocks."""
    yield from re.findall(rf"^```({languages})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_block(language: str, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done


EXPORT = "fastvlm export tiny -o model\n"
"""The first line of most pages. It runs once, and each page has a copy of its folder."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `EXPORT` writes."""
    folder = tmp_path_factory.mktemp("docs")
    run_block("sh", EXPORT, folder)
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if page.name != "api.md"], ids=lambda page: page.name)
def test_blocks_of_a_page_run_in_order(page: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime" / "samples", tmp_path / "runtime" / "samples")
    for language, code in blocks(page, "sh|python"):
        if code.startswith(EXPORT):
            shutil.copytree(exported, tmp_path / "model")  # fails if the page has written one already
        done = run_block(language, code.removeprefix(EXPORT), tmp_path)
        if page.name == "README.md" and "generate model" in code:
            assert done.stdout.splitlines()[-1] in page.read_text()  # the answer under the command is the real one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_blocks_are_accepted(page: Path) -> None:
    for _, code in blocks(page, "sh|bash"):
        for line in code.splitlines():
            for words in re.findall(r"(?:^|\| )(fastvlm .*)", line):
                _, name, *arguments = shlex.split(words, comments=True)
                if name in COMMANDS:
                    COMMANDS[name].make_context(name, arguments)  # raises a usage error
                else:
                    assert name in OTHERS, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_prose_exist(page: Path) -> None:
    if page.name == "api.md":
        pytest.skip("it quotes the docstrings of the library")
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z0-9-]+)", page.read_text()))
    assert named - OPTIONS - SECONDARY - OTHERS == set()
    assert not named & GONE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_of_a_page_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", page.read_text())
    for target in ("".join(pair) for pair in targets):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_readme_is_short_and_shows_an_answer_early() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert next(n for n, line in enumerate(lines, 1) if line.startswith("An orange star")) <= 25


def test_readme_and_ci_name_the_same_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "test: $(INSTALLED)" in (ROOT / "Makefile").read_text()


def test_every_command_has_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert {name for name in COMMANDS if f"fastvlm {name}" not in text} == set()


def test_api_page_is_current() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == made().api(), "run `make docs`"


@pytest.mark.slow
def test_layout_picture_is_current() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    assert page == made().with_layout(page), "run `make docs`"


def test_layout_picture_has_no_arrow_uphill() -> None:
    build = made()
    ranks = {"cli": 0, "export": 1, "runtime": 1, "quant": 2, "models": 3}
    edges = build.imports_between_folders()
    assert ("cli", "models") in edges
    assert all(ranks[a.split("/")[0]] <= ranks[b.split("/")[0]] for a, b in edges)


def strings() -> str:
    """Returns every string of the source with `{}` for its placeholders, one a line."""
    found = []
    for folder in ("cli", "export", "models", "quant", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


@pytest.mark.slow
def test_error_texts_of_troubleshooting_are_in_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = [heading for heading in re.findall(r"^### (.*)$", page, re.MULTILINE) if not heading.startswith("The ")]
    source = strings()
    options = {f"--{word}": word.replace("-", "_") for word in ("force", "allow-lint", "allow-shortfall")}
    for heading in headings:
        text = re.sub(r"\b1024\b", "{}", heading)
        argument = next((text.replace(o, a) for o, a in options.items() if o in text), text)
        python = re.sub(r"pass (\w+)", r"\1=True", argument)
        assert text in source or argument in source or python in source, heading
