"""Apple's archives by name: fetched, checked, unpacked into a folder that appears only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..disk import check_space
from ..errors import DownloadError, OutputError
from .archives import FOLDERS, archive_url, is_needed
from .http_file import OnProgress, fetch
from .record import add_missing, missing, recorded, recorded_sizes, sizes_in, write_record
from .unpack import unpack

ROOM = 2
"""Times the archive's size: itself, and what comes out of it."""


def download_archive(
    name: str,
    destination: Path,
    *,
    url: str | None = None,
    sha256: str | None = None,
    on_progress: OnProgress = lambda here, total: None,
) -> dict[str, Any]:
    """Fetches one of `FOLDERS` into `destination` and returns what is known of it: url, sha256 of the archive.

    What an earlier attempt left in `.DESTINATION.download` is gone on from. To a folder that an earlier call filled,
    only files that are gone from it are added. Apple publishes no checksums: with no `sha256` given, the size, the
    archive's own checksums and the weights' headers are what is checked.

    Raises:
        DownloadError: see `fetch` and `unpack`; or the archive holds no checkpoint.
        OutputError: the destination is in use, or the disk is full.
    """
    sizes, known = filled_from(name, sha256, recorded(destination))
    if sizes and not missing(destination, sizes):
        return {"already_there": True}
    if sizes:  # what is there stays, and is of the archive with this sha256
        destination, sha256 = destination.resolve(), known
    else:
        check_free(destination)
    with work_folder(destination) as work:
        if not sizes:
            check_free(destination)  # still: another download may have ended just now
        archive = work / f"{FOLDERS[name]}.zip"
        source = url or archive_url(name)
        digest = fetch(source, archive, sha256=sha256, room=ROOM, on_progress=on_progress)
        check_space(destination, archive.stat().st_size)
        unpacked = work / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        try:
            check_checkpoint(unpack(archive, unpacked, is_needed), source)
        except DownloadError:
            archive.unlink()  # it would fail again
            raise
        record = {
            "archive": name,
            "url": source,
            "sha256": digest,
            "sha256_was_known": sha256 is not None,
            "sizes": sizes_in(unpacked),
        }
        write_record(unpacked, record)
        if sizes:
            add_missing(unpacked, destination, sizes)
            return record
        if destination.exists():
            destination.rmdir()  # empty, as was checked
        unpacked.replace(destination)
    return record


def filled_from(name: str, sha256: str | None, record: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """The files' sizes and the archive's sha256, if this archive filled a folder with this record; else nothing."""
    known = record.get("sha256")
    if record.get("archive") != name or not isinstance(known, str) or (sha256 or known).lower() != known:
        return {}, ""
    return recorded_sizes(record), known


def check_free(destination: Path) -> None:
    """Raises OutputError when something is at `destination` already."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(f"{destination} exists and is no folder: choose another with --to")
    if destination.is_dir() and any(destination.iterdir()):
        raise OutputError(f"{destination} exists and is not empty: remove it, or choose another folder with --to")


def check_checkpoint(names: list[str], source: str) -> None:
    """Raises DownloadError unless there are a config and weights among the files."""
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        found = ", ".join(sorted(names)[:6]) or "nothing that is needed"
        raise DownloadError(f"{source} holds no checkpoint (config.json and *.safetensors); found {found}")


@contextlib.contextmanager
def work_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside `destination` that outlives an attempt that fails, and is removed after one that does not.

    Raises:
        OutputError: another process is at it.
    """
    work = destination.absolute().with_name(f".{destination.name}.download")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock", destination):
        try:
            yield work
        except BaseException:
            if [path.name for path in work.iterdir()] == ["lock"]:  # nothing has come that could be gone on from
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _locked(lock: Path, destination: Path) -> IO[str]:
    """The file, open and locked. Raises OutputError where another process has it, or had it and removed it just now."""
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
    raise OutputError(f"another process is downloading to {destination}: wait for it, then run the same command again")
