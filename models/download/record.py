"""What a download writes of itself beside its files, and what of them is still there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DownloadError, OutputError
from ..json_file import read_json_object

RECORD = "fastvlm-download.json"
"""Beside the files: where they are from."""


def recorded(destination: Path) -> dict[str, Any]:
    """What an earlier download to `destination` wrote of itself; nothing where there was none."""
    try:
        return read_json_object(destination / RECORD, DownloadError)
    except DownloadError:
        return {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of each file, by its path relative to `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def recorded_sizes(record: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a record holds; nothing where it holds none that can be."""
    sizes = record.get("sizes")
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        return {}
    return sizes


def missing(destination: Path, sizes: Mapping[str, int]) -> list[str]:
    """Names of the files that an earlier download brought and that are gone.

    Raises:
        OutputError: one has another size now. It may hold somebody's work: it is not replaced.
    """
    gone = [name for name in sizes if not (destination / name).exists()]
    for name in sizes.keys() - gone:
        path = destination / name
        if not path.is_file() or path.stat().st_size != sizes[name]:
            raise OutputError(
                f"{path} is not the file of {sizes[name]:,} bytes that was downloaded: move it away and run the same "
                "command again, which fetches it anew"
            )
    return gone


def add_missing(folder: Path, destination: Path, names: Iterable[str]) -> None:
    """Moves those of the files into `destination` that it has none of."""
    for name in sizes_in(folder).keys() & set(names):
        target = destination / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(target)
