"""The digest of a package's content, remembered until its files change: hashing 125 to 250 MB takes 0.1 s and more."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from ..models.errors import PackageError

SETTLED_SECONDS = 2.0
"""Age that a change must have to be remembered: a file that changes again within a tick of the clock looks the same."""

MAX_RECORDS = 64
"""Packages that are remembered, by path; a record has about 500 bytes."""


def package_files(package: Path) -> list[Path]:
    """Returns a package's files in order, without hidden ones: the Finder leaves its own wherever it looks.

    Raises:
        PackageError: it has none.
    """
    files = sorted(path for path in package.rglob("*") if path.is_file() and not _hidden(path.relative_to(package)))
    if not files:
        raise PackageError(f"{package} is not a package: it has no files")
    return files


def package_digest(package: Path, version: str, records: Path | None = None) -> str:
    """Returns sha256 of a package's files, with their paths, and of the version of what compiles it.

    `records` is a folder of earlier digests, which serve while size, inode and times of every file are the same.

    Raises:
        PackageError: the package has no files.
    """
    content = None if records is None else _recorded(package, records)
    if content is None:
        started = time.time()
        before = _states(package)
        content = _content_digest(package)
        if records is not None and _settled(before, started):
            _record(package, records, before, content)
    return hashlib.sha256(f"{version}\0{content}".encode()).hexdigest()


def _content_digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in package_files(package):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def _states(package: Path) -> list[list[str | int]]:
    """Returns path, size, inode and times of each file; the time of the inode's change cannot be set by a program."""
    states: list[list[str | int]] = []
    for file in package_files(package):
        found = file.stat()
        name = file.relative_to(package).as_posix()
        states.append([name, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    return states


def _settled(states: list[list[str | int]], now: float) -> bool:
    return all(max(int(mtime), int(ctime)) < 1e9 * (now - SETTLED_SECONDS) for *_, mtime, ctime in states)


def _recorded(package: Path, records: Path) -> str | None:
    """Returns the content's digest from an earlier call, if nothing has changed since."""
    try:
        record = json.loads(_place(package, records).read_text(encoding="utf-8"))
        content = str(record["content"])
        unchanged = record["files"] == _states(package)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return content if unchanged and len(content) == 64 else None


def _record(package: Path, records: Path, states: list[list[str | int]], content: str) -> None:
    """Writes a record by rename; a cache that cannot be written only costs the time of hashing again."""
    with contextlib.suppress(OSError):
        records.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", dir=records)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"files": states, "content": content}, stream)
            Path(name).replace(_place(package, records))
        except OSError:
            Path(name).unlink(missing_ok=True)
        oldest_first = sorted(records.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[:-MAX_RECORDS]:
            path.unlink(missing_ok=True)


def _place(package: Path, records: Path) -> Path:
    return records / f"{hashlib.sha256(os.fsencode(package.resolve())).hexdigest()[:20]}.json"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
