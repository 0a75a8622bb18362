"""Prints the figures that describe the source: prose, files, imports, tests and docstrings.

python tests/house_counts.py [ROOT]
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import prose
from prose import SOURCE_FOLDERS, passages, python_files

WORDS = {
    "is/are no": r"\b(?:is|are) no\b",
    "tell(s)/told": r"\b(?:tells?|told)\b",
    "stand(s)": r"\bstands?\b",
    "beside": r"\bbeside\b",
    "of ours / of Apple's": r"\bof (?:ours|\w+'s)(?![\w ]* \w)",
    "go(es)/gone on": r"\b(?:goes|gone|go) on\b",
    "anew": r"\banew\b",
}
OPENINGS = {'"Of ..."': r"Of\b", '"What ..."': r"What\b", '"Whether ..."': r"Whether\b", '"As ..."': r"As\b"}


def sources() -> list[Path]:
    return [path for folder in SOURCE_FOLDERS for path in python_files(folder)]


def prose_counts() -> None:
    """Prints each habit's count per 10,000 words of docstrings, comments and messages."""
    texts = [passage.text for path in sources() for passage in passages(path)]
    words = sum(len(text.split()) for text in texts)
    print(f"prose: {words:,} words; per 10,000:")
    for name, pattern in WORDS.items():
        count = sum(len(re.findall(pattern, text)) for text in texts)
        print(f"  {name:24} {count * 1e4 / words:5.1f}  ({count})")
    for name, pattern in OPENINGS.items():
        count = sum(bool(re.match(pattern, text.strip())) for text in texts)
        print(f"  {name + ' at the start':24} {count * 1e4 / words:5.1f}  ({count})")


def file_counts() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    longest = max(lengths, key=lambda path: lengths[path])
    print(f"files: {len(lengths)}, median {statistics.median(lengths.values()):.0f} lines, largest {lengths[longest]} "
          f"({longest.relative_to(prose.ROOT)})")  # fmt: skip


def imports(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yields the project's modules that a file imports, at any level of it, but for type checking alone."""
    package = path.relative_to(prose.ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in for_types:
            continue
        stem = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{stem}.{alias.name}" if f"{stem}.{alias.name}" in modules else stem


def import_counts() -> None:
    """Prints the circles of imports and the modules with exactly one importer."""
    modules = {".".join(path.relative_to(prose.ROOT).with_suffix("").parts): path for path in sources()}
    modules = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    graph = {name: {found for found in imports(path, modules) if found in modules} for name, path in modules.items()}
    importers: dict[str, set[str]] = defaultdict(set)
    for path in [*sources(), *prose.ROOT.glob("*.py")]:
        for found in imports(path, modules):
            importers[found].add(str(path))
    single = sorted(name for name in modules if len(importers[name]) == 1)
    print(f"circles: {len(found := circles(graph))} {found or ''}")
    print(f"modules with one importer: {len(single)} of {len(modules)}: {', '.join(single)}")


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the strongly connected components of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {
        tuple(sorted({name, *(other for other in reached[name] if name in reached[other])}))
        for name in graph
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def test_counts() -> None:
    """Prints how many modules have a test file of their name in the folder that mirrors theirs."""
    tests = {str(path.relative_to(prose.ROOT / "tests")) for path in (prose.ROOT / "tests").rglob("test_*.py")}
    modules = [path for path in sources() if path.name != "__init__.py"]
    missing = [
        path for path in modules if str(path.relative_to(prose.ROOT).with_name(f"test_{path.name}")) not in tests
    ]
    print(f"modules with their own test file: {len(modules) - len(missing)} of {len(modules)}; without: "
          f"{', '.join(str(path.relative_to(prose.ROOT)) for path in missing)}")  # fmt: skip


def docstring_counts() -> None:
    """Prints the share of public functions, classes and methods with a docstring."""
    counts: Counter[bool] = Counter()
    for path in sources():
        for node in public(ast.parse(path.read_text(encoding="utf-8"))):
            counts[ast.get_docstring(node) is not None] += 1
    print(f"public names with a docstring: {counts[True]} of {counts.total()} ({counts[True] / counts.total():.0%})")


def public(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields public functions, classes and methods. `forward` and `__call__` are documented by their class."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if child.name != "forward":
                yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        prose.ROOT = Path(sys.argv[1]).resolve()
    prose_counts()
    file_counts()
    import_counts()
    test_counts()
    docstring_counts()
