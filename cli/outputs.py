"""Files that a command is asked to write: what would fail only after minutes of work is told before."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from ..models.errors import UsageError
from ..models.folder_layout import MANIFEST_NAME

STDOUT = Path("-")
"""As a file's name: print it."""


REPORT = re.compile(rb'\{\s*"schema":\s*"fastvlm\.')
TABLES = re.compile(rb"\*\*.*\n\n\| ms *\| *median run|An estimate from peak rates")
PICTURE = re.compile(rb"\x89PNG\r\n")
"""How files begin that these commands write."""
HEAD_BYTES = 4096


def check_outputs(*paths: Path | None) -> None:
    """Raises UsageError unless every file that is asked for can be written, and lies in no model folder."""
    for path in paths:
        if path is None or path == STDOUT:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder, or the folder for it does not exist")
        for folder in path.resolve().parents:
            if (folder / MANIFEST_NAME).is_file():
                raise UsageError(f"{path} would lie in the model folder {folder}: name a file outside of it")


def check_reports(*paths: Path | None) -> None:
    """Raises UsageError unless every JSON report can be written, and replaces nothing but another one."""
    check_outputs(*paths)
    _check_replaced(paths, REPORT, "a report of fastvlm")


def check_tables(*paths: Path | None) -> None:
    """Raises UsageError unless every Markdown file can be written, and replaces nothing but earlier tables."""
    check_outputs(*paths)
    _check_replaced(paths, TABLES, "tables of fastvlm")


def check_pictures(*paths: Path | None) -> None:
    """Raises UsageError unless every picture is a PNG that can be written, and replaces nothing but another one."""
    check_outputs(*paths)
    for path in paths:
        if path is not None and path.suffix.lower() != ".png":
            raise UsageError(f"pictures are written as PNG: name a file that ends in .png, not {path.name!r:.60}")
    _check_replaced(paths, PICTURE, "a PNG")


def _check_replaced(paths: Iterable[Path | None], begin: re.Pattern[bytes], kind: str) -> None:
    """Raises UsageError where a file stands that begins otherwise: it is somebody's. Empty ones give way."""
    for path in paths:
        if path is None or path == STDOUT or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head and not begin.match(head):
            raise UsageError(
                f"{path} exists and is not {kind}, so it is not replaced: choose another name or remove it"
            )


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
