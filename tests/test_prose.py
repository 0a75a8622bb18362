"""The rules for prose: words that never occur, and how a docstring begins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .prose import ROOT, SOURCE_FOLDERS, Passage, passages

BANNED = re.compile(
    r"\b(anew|amid|beside|for want of|whoever|is no|are no|gone on|goes? on|told|strangers?|of ours)\b", re.IGNORECASE
)
"""The words that never occur in source or documents."""

BAD_OPENING = re.compile(r"(Of|What|Whether|As|See)\b")
"""The openings of a docstring that are not a verb or a noun phrase."""

PENDING: frozenset[str] = frozenset(("tests/mac",))
"""The folders and documents that are still to be converted. A subfolder counts on its own."""

DATA = frozenset(("models/tiny/questions.py", "tests/test_prose.py"))
"""The files whose strings are data: questions and answers of the trained model, and the banned words themselves."""


def files() -> Iterator[Path]:
    for folder in (*SOURCE_FOLDERS, "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield from sorted(ROOT.glob("*.py"))
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))


def group(path: Path) -> str:
    """Returns the folder of a source file, or the document itself."""
    relative = path.relative_to(ROOT)
    return str(relative) if path.suffix == ".md" else str(relative.parent)


GROUPS = sorted({group(path) for path in files()})


def fault(passage: Passage) -> str | None:
    """Returns the rule that a passage breaks, with its place, or None."""
    if found := BANNED.search(passage.text):
        return f"{passage.place}: '{found[0]}' in: {passage.text.strip()[:100]}"
    if passage.kind == "docstring" and BAD_OPENING.match(passage.text.strip()):
        return f"{passage.place}: the docstring opens with '{passage.text.split()[0]}'"
    return None


def faults(name: str) -> list[str]:
    """Returns every fault in a folder or document."""
    chosen = [path for path in files() if group(path) == name and str(path.relative_to(ROOT)) not in DATA]
    return [found for path in chosen for passage in passages(path) if (found := fault(passage))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GROUPS if name not in PENDING])
def test_prose_has_no_banned_word_or_opening(name: str) -> None:
    assert faults(name) == []


def test_pending_folders_exist() -> None:
    assert set(GROUPS) >= PENDING


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ('"""Of `x`: one."""', "opens with 'Of'"),
        ('x = 1\n"""What x is."""', "opens with 'What'"),
        ('raise ValueError(f"{x} is no folder")', "'is no'"),
        ("x = 1  # made anew", "'anew'"),
    ],
)
def test_fault_is_found_in_each_kind_of_prose(source: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: source)
    found = [text for passage in passages(ROOT / "models" / "x.py") if (text := fault(passage))]
    assert len(found) == 1
    assert word in found[0]


def test_good_prose_has_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: '"""Returns the size, which is not a folder\'s."""')
    assert [fault(passage) for passage in passages(ROOT / "models" / "x.py")] == [None]
