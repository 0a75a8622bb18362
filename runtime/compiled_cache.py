"""Compiled copies of Core ML packages, kept between runs, because compiling takes seconds.

A copy is found by the digest of its package's content. Hashing 125 to 250 MB takes 0.1 s and more, so the cache also
records digests and reuses them while no file of the package has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..models.coreml_errors import coreml_reason
from ..models.errors import OutputError, PackageError

ENVIRONMENT_VARIABLE = "FASTVLM_CACHE"
"""The environment variable that names the cache folder."""

MAX_COPIES = 8
"""The number of compiled copies that are kept, the most recently used ones. FastViTHD in 8 bits takes 125 MB."""

ABANDONED_SECONDS = 24 * 3600
"""The age in seconds at which a temporary folder must be from a killed process. Compiling takes seconds to minutes."""

ATTEMPTS = 2
"""The number of attempts to open a copy. A new copy costs the engine's compilation, up to two minutes."""

RETRY_SECONDS = 0.5
"""The pause between two attempts, in seconds. The service that loads models may be restarting."""

USED, SHARES = ".used", ".shares"
"""The suffixes of the records next to a copy: its last use, and the engine's share of its work."""

RECORDS = "digests"
"""The folder of the packages' digests in the cache folder."""

SETTLED_SECONDS = 2.0
"""The age in seconds from which a change is recorded. Another change in the same tick of the clock would not show."""

MAX_RECORDS = 64
"""The number of packages whose digest is recorded, by path. A record has about 500 bytes."""

Predict = Callable[[dict[str, Any]], dict[str, Any]]
"""Arrays by input name -> arrays by output name."""


class Compiler(Protocol):
    """The interface that compiles packages and opens the result, implemented by `coreml.CoreMLTools`.

    Attributes:
        version: the version of the compiler. A compiled copy is valid for this version alone.
    """

    version: str

    def compile(self, package: Path, destination: Path) -> None:
        """Writes the compiled copy to `destination`, a `.mlmodelc` folder that does not exist yet."""

    def open(self, compiled: Path) -> Predict:
        """Opens a compiled copy and returns the function that runs it."""


@dataclass(frozen=True)
class Opened:
    """An open package."""

    predict: Predict
    compiled_now: bool
    compiled: Path
    """The copy that was opened."""


class CompiledCache:
    """A cache of the last few compiled packages by the digest of their content.

    The cache is in `folder`, by default in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None, max_copies: int = MAX_COPIES) -> None:
        self.folder = folder or user_cache_folder() / "compiled"
        self.max_copies = max_copies

    def open(self, package: Path, compiler: Compiler) -> Opened:
        """Opens a package, and compiles it first unless the cache has a copy of the same content that opens.

        Raises:
            PackageError: the package does not compile, or its compiled copy does not open.
            OutputError: the cache folder cannot be written.
        """
        place = self.place(package, compiler.version)
        if place.is_dir():
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(RETRY_SECONDS)
                with contextlib.suppress(Exception):  # a new copy replaces one that does not open for any reason
                    opened = Opened(compiler.open(place), compiled_now=False, compiled=place)
                    _mark_used(place)
                    return opened
            _remove(place)
        self._compile(package, place, compiler)
        try:
            return Opened(compiler.open(place), compiled_now=True, compiled=place)
        except Exception as reason:  # coremltools raises plain Exception and RuntimeError
            raise PackageError(f"{package} was compiled but does not open: {coreml_reason(reason)}") from reason

    def compiled(self, package: Path, compiler: Compiler) -> Path:
        """Returns the compiled copy without opening it, and makes it first if there is none. Raises as `open` does."""
        place = self.place(package, compiler.version)
        if place.is_dir():
            _mark_used(place)
        else:
            self._compile(package, place, compiler)
        return place

    def place(self, package: Path, version: str) -> Path:
        """Returns the path of the compiled copy of this content, which may not exist yet."""
        digest = package_digest(package, version, self.folder / RECORDS)
        return self.folder / f"{package.stem}-{digest[:20]}.mlmodelc"

    def _evict(self, newest: Path) -> None:
        """Removes the least recently used copies beyond the bound, and folders that killed processes left."""
        _mark_used(newest)
        copies = sorted(self.folder.glob("*.mlmodelc"), key=_last_used, reverse=True)
        others = [copy for copy in copies if copy != newest]
        now = time.time()
        left = [path for path in self.folder.glob(".compiling-*") if now - _changed(path) > ABANDONED_SECONDS]
        for path in (*others[max(0, self.max_copies - 1) :], *left):
            _remove(path)
        for note in (*self.folder.glob(f"*{USED}"), *self.folder.glob(f"*{SHARES}")):
            if not note.with_suffix(".mlmodelc").exists():
                note.unlink(missing_ok=True)

    def _compile(self, package: Path, place: Path, compiler: Compiler) -> None:
        """Compiles into a temporary folder and renames, so another process never sees half a copy."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=".compiling-", dir=self.folder))
        except OSError as reason:
            raise OutputError(
                f"the cache folder {self.folder} cannot be written ({reason.strerror}). Name another in "
                f"{ENVIRONMENT_VARIABLE}."
            ) from reason
        try:
            fresh = workplace / place.name
            try:
                compiler.compile(package, fresh)
            except Exception as reason:  # coremltools raises plain Exception and RuntimeError
                raise PackageError(f"{package} does not compile: {coreml_reason(reason)}") from reason
            if not fresh.is_dir():
                raise PackageError(f"{package} does not compile: nothing was written to {fresh}")
            with contextlib.suppress(OSError):  # another process was faster, and its copy has the same content
                fresh.rename(place)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        self._evict(place)


def _mark_used(place: Path) -> None:
    """Records the use in a separate file, because Core ML may take a folder with a new date for a new model."""
    with contextlib.suppress(OSError):  # a read-only cache is still useful
        place.with_suffix(USED).touch()


def _last_used(place: Path) -> float:
    return _changed(place.with_suffix(USED)) or _changed(place)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another process meanwhile
        return 0.0


def _remove(place: Path) -> None:
    """Removes a copy and its records."""
    shutil.rmtree(place, ignore_errors=True)
    if place.suffix == ".mlmodelc":
        for suffix in (USED, SHARES):
            with contextlib.suppress(OSError):
                place.with_suffix(suffix).unlink(missing_ok=True)


def user_cache_folder() -> Path:
    """Returns the folder that FASTVLM_CACHE names, or else `fastvlm` in the system's folder of caches."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastvlm"


def package_files(package: Path) -> list[Path]:
    """Returns a package's files in order, without hidden ones such as those of the Finder.

    Raises:
        PackageError: the package has no files.
    """
    files = sorted(path for path in package.rglob("*") if path.is_file() and not _hidden(path.relative_to(package)))
    if not files:
        raise PackageError(f"{package} is not a package: it has no files")
    return files


def package_digest(package: Path, version: str, records: Path | None = None) -> str:
    """Returns the sha256 of a package's files with their paths and of the compiler's version.

    `records` is a folder of earlier digests, which are valid while size, inode and times of every file are the same.

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
    """Returns path, size, inode and times of each file. No program can set the time of the inode's change."""
    states: list[list[str | int]] = []
    for file in package_files(package):
        found = file.stat()
        name = file.relative_to(package).as_posix()
        states.append([name, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    return states


def _settled(states: list[list[str | int]], now: float) -> bool:
    return all(max(int(mtime), int(ctime)) < 1e9 * (now - SETTLED_SECONDS) for *_, mtime, ctime in states)


def _recorded(package: Path, records: Path) -> str | None:
    """Returns the content's digest from an earlier call if nothing has changed since, or else None."""
    try:
        record = json.loads(_record_path(package, records).read_text(encoding="utf-8"))
        content = str(record["content"])
        unchanged = record["files"] == _states(package)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return content if unchanged and len(content) == 64 else None


def _record(package: Path, records: Path, states: list[list[str | int]], content: str) -> None:
    """Writes a record by rename. A cache that cannot be written only costs the time of hashing again."""
    with contextlib.suppress(OSError):
        records.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", dir=records)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"files": states, "content": content}, stream)
            Path(name).replace(_record_path(package, records))
        except OSError:
            Path(name).unlink(missing_ok=True)
        oldest_first = sorted(records.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[:-MAX_RECORDS]:
            path.unlink(missing_ok=True)


def _record_path(package: Path, records: Path) -> Path:
    return records / f"{hashlib.sha256(os.fsencode(package.resolve())).hexdigest()[:20]}.json"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
