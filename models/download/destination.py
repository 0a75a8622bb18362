"""The destination folder of a download: its lock, its record, and the checks that keep existing files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import DownloadError, OutputError
from ..files import read_json_object
from ..foreign_files import has_content, is_system_file

RECORD = "fastvlm-download.json"
"""The name of the file in a downloaded folder that records its source."""


@contextlib.contextmanager
def work_folder(destination: Path) -> Iterator[Path]:
    """Yields a hidden, locked folder next to `destination`. It is kept after a failure and removed after a success.

    Raises:
        OutputError: another process is using it.
    """
    work = destination.absolute().with_name(f".{destination.name}.download")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock", destination):
        try:
            yield work
        except BaseException:
            if [path.name for path in work.iterdir()] == ["lock"]:  # nothing was received that could be resumed
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _locked(lock: Path, destination: Path) -> IO[str]:
    """Returns the lock file, open and locked.

    Raises:
        OutputError: another process has the lock, or has just released and removed it.
    """
    import fcntl

    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                opened.pop_all()
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
    raise OutputError(f"{destination}: another process is downloading to it. Wait for it, then run the command again.")


def check_free(destination: Path) -> None:
    """Checks that `destination` is missing or an empty folder.

    Raises:
        OutputError: it is a file, a link or a folder with content.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(f"{destination}: exists and is not a folder. Choose another folder.")
    if destination.is_dir() and has_content(destination):
        raise OutputError(f"{destination}: exists and is not empty. Remove it or choose another folder.")


def check_checkpoint(names: list[str], source: str) -> None:
    """Checks that there are a config and weights among the file `names`.

    Raises:
        DownloadError: one of them is missing.
    """
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        found = ", ".join(sorted(names)[:6]) or "no usable file"
        raise DownloadError(f"{source}: must have a checkpoint (config.json and *.safetensors), got {found}")


def publish(folder: Path, destination: Path) -> None:
    """Renames the complete `folder` to `destination`, which is missing or an empty folder but for macOS's files."""
    if destination.exists():
        for path in filter(is_system_file, list(destination.iterdir())):
            path.unlink()
        destination.rmdir()
    folder.replace(destination)


def read_record(destination: Path) -> dict[str, Any]:
    """Returns the record of an earlier download to `destination`, empty if there is none."""
    try:
        return read_json_object(destination / RECORD, DownloadError)
    except DownloadError:
        return {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a download into `folder`."""
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size of each file in bytes, by its path relative to `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def recorded_sizes(record: Mapping[str, Any]) -> dict[str, int]:
    """Returns the file sizes in a record, empty if it has no valid ones."""
    sizes = record.get("sizes")
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        return {}
    return sizes


def missing_files(destination: Path, sizes: Mapping[str, int]) -> list[str]:
    """Returns the names of the downloaded files that are missing now.

    Raises:
        OutputError: a file has another size now. It may be the user's work, so it is not overwritten.
    """
    missing = [name for name in sizes if not (destination / name).exists()]
    for name in sizes.keys() - missing:
        path = destination / name
        if not path.is_file() or path.stat().st_size != sizes[name]:
            raise OutputError(
                f"{path}: is not the downloaded file of {sizes[name]:,} bytes. "
                "Move it away and run the command again to download it."
            )
    return missing


def add_missing(folder: Path, destination: Path, names: Iterable[str]) -> None:
    """Moves the files `names` from `folder` into `destination`, except those that exist there."""
    for name in file_sizes(folder).keys() & set(names):
        target = destination / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(target)
