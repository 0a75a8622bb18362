"""Output files of commands. They are checked before the work, and written whole or not at all."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from ..models.errors import UsageError
from ..models.folder_layout import MANIFEST_NAME

REPORT = re.compile(rb'\{\s*"schema":\s*"fastvlm\.')
TABLES = re.compile(rb"\*\*.*\n\n\| ms *\| *median run|An estimate from peak rates")
PICTURE = re.compile(rb"\x89PNG\r\n")
ARRAYS = re.compile(rb"\x93NUMPY|PK\x03\x04")
"""The first bytes of the files that these commands write."""
HEAD_BYTES = 4096
"""The bytes that are read to recognize a file: the title and first table row of a Markdown report fit."""


def check_outputs(*paths: Path | None) -> None:
    """Raises UsageError unless every given file can be written and is outside of model folders."""
    for path in paths:
        if path is None:
            continue
        if path == Path("-"):
            raise UsageError("- is not a file. To print to stdout, use as_json=True", "as_json")
        if path.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder, or its folder does not exist")
        check_places(path)


def check_places(*paths: Path) -> None:
    """Raises UsageError unless every file or folder is in a folder that exists, and outside of model folders."""
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder, or its folder does not exist")
        for folder in (path.resolve(), *path.resolve().parents):
            if (folder / MANIFEST_NAME).is_file():
                raise UsageError(f"{path} is in the model folder {folder}. Choose a place outside of it")


def check_reports(*paths: Path | None) -> None:
    """Raises UsageError unless every JSON report can be written, and overwrites only a report."""
    check_outputs(*paths)
    _check_replaced(paths, REPORT, "a report of fastvlm")


def check_tables(*paths: Path | None) -> None:
    """Raises UsageError unless every Markdown file can be written, and overwrites only tables."""
    check_outputs(*paths)
    _check_replaced(paths, TABLES, "tables of fastvlm")


def check_pictures(*paths: Path | None) -> None:
    """Raises UsageError unless every image is a PNG that can be written, and overwrites only a PNG."""
    check_outputs(*paths)
    for path in paths:
        if path is not None and path.suffix.lower() != ".png":
            raise UsageError(f"{path.name:.60}: images are written as PNG. Choose a name that ends in .png")
    _check_replaced(paths, PICTURE, "a PNG")


def check_arrays(path: Path | None) -> None:
    """Raises UsageError unless the file is a .npy or .npz that can be written, and overwrites only such a file."""
    check_outputs(path)
    if path is not None and path.suffix not in (".npy", ".npz"):
        raise UsageError(f"{path.name:.60}: arrays are written as .npy or .npz. Choose a name that ends in one of them")
    _check_replaced([path], ARRAYS, "an array file")


def _check_replaced(paths: Iterable[Path | None], begin: re.Pattern[bytes], kind: str) -> None:
    """Raises UsageError for a file that exists, is not empty and does not start with `begin`."""
    for path in paths:
        if path is None or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head and not begin.match(head):
            raise UsageError(f"{path} exists and is not {kind}. Choose another name, or remove it")


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    write_whole(path, text.encode())


def write_picture(path: Path, draw: Callable[[BinaryIO], object]) -> None:
    """Writes a PNG file. `draw` gets a binary file to write it to."""
    drawn = io.BytesIO()
    draw(drawn)
    write_whole(path, drawn.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, which replaces an earlier one only when it is complete. Raises OSError."""
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
