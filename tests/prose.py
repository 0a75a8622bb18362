"""The prose of the project: docstrings, comments, messages and Markdown, each with its place."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("cli", "export", "models", "quant", "runtime")

Kind = Literal["docstring", "comment", "message", "markdown"]
FEWEST_WORDS = 3
"""The number of words from which a string counts as a message. Shorter ones are mostly names and keys."""


@dataclass(frozen=True)
class Passage:
    """A piece of prose and its place."""

    path: Path
    line: int
    kind: Kind
    text: str

    @property
    def place(self) -> str:
        """The file, relative to the root, and the line."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def python_files(folder: str) -> list[Path]:
    """Returns the Python files of a folder and its subfolders, or of the root itself for an empty name."""
    return sorted((ROOT / folder).rglob("*.py")) if folder else sorted(ROOT.glob("*.py"))


def passages(path: Path) -> Iterator[Passage]:
    """Yields every piece of prose in a Python or Markdown file. Test files have no messages of their own."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from _markdown(path, text)
        return
    is_test = "tests" in path.relative_to(ROOT).parts
    tree = ast.parse(text)
    documented = {id(node) for node in _docstring_nodes(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in documented:
            yield Passage(path, node.lineno, "docstring", node.value)
        elif not is_test and len(node.value.split()) >= FEWEST_WORDS:
            yield Passage(path, node.lineno, "message", node.value)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(path, token.start[0], "comment", token.string.lstrip("# "))


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yields docstrings, and the strings under constants and fields."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value


def _markdown(path: Path, text: str) -> Iterator[Passage]:
    """Yields the lines outside of code blocks, without inline code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.strip():
            yield Passage(path, number, "markdown", re.sub(r"`[^`]*`", "`code`", line))
