"""Files that a command is asked to write: what would fail only after minutes of work is told before."""

from __future__ import annotations

import sys
from pathlib import Path

from ..models.errors import UsageError

STDOUT = Path("-")
"""As a file's name: print it."""


def check_outputs(*paths: Path | None) -> None:
    """Raises UsageError unless every file that is asked for can be written."""
    for path in paths:
        if path is not None and path != STDOUT and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{path} cannot be written: it is a folder, or the folder for it does not exist")


def check_pictures(*paths: Path | None) -> None:
    """Raises UsageError unless every picture that is asked for is a PNG that can be written."""
    check_outputs(*paths)
    for path in paths:
        if path is not None and path.suffix.lower() != ".png":
            raise UsageError(f"pictures are written as PNG: name a file that ends in .png, not {path.name!r:.60}")


def write_text(path: Path, text: str) -> None:
    """To the file, or to stdout for `-`."""
    if path == STDOUT:
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")
