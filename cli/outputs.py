"""Files that a command is asked to write: what would fail only after minutes of work is told before."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
        write_whole(path, text.encode())


def write_picture(path: Path, draw: Callable[[BinaryIO], object]) -> None:
    """What `draw` writes, as PNG, to the file that it is given."""
    drawn = io.BytesIO()
    draw(drawn)
    write_whole(path, drawn.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Writes all of it or nothing: an earlier file stays as it was until the new one is complete. Raises OSError."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe, a device
        path.write_bytes(content)
        return
    partial = path.with_name(f".fastvlm-{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
