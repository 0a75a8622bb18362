"""Compiled copies of Core ML packages, kept between runs: compiling takes seconds, every time."""

from __future__ import annotations

import contextlib
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
from .package_digest import package_digest

ENVIRONMENT_VARIABLE = "FASTVLM_CACHE"

MAX_COPIES = 8
"""Compiled packages that are kept, 125 MB each for FastViTHD in 8 bits: those used longest ago go first."""

ABANDONED_SECONDS = 24 * 3600
"""Age at which a workplace is what a killed process left: compiling takes seconds."""

ATTEMPTS = 2
"""Times that a copy is opened before it is given up: a new one costs the engine's compilation, up to two minutes."""

RETRY_SECONDS = 0.5
"""Pause between two attempts: the service that loads models may be starting again."""

USED, SHARES = ".used", ".shares"
"""What is recorded of a copy, next to it: its last use, and the engine's share of its work."""

RECORDS = "digests"
"""Folder of the digests of packages, in the cache folder."""

Predict = Callable[[dict[str, Any]], dict[str, Any]]
"""Arrays by input name -> arrays by output name."""


class Compiler(Protocol):
    """What compiles packages and opens the result: Core ML, or a stand-in in tests."""

    version: str
    """A compiled copy serves only the version that made it."""

    def compile(self, package: Path, destination: Path) -> None:
        """Writes the compiled copy to `destination`, a `.mlmodelc` folder that does not exist yet."""

    def open(self, compiled: Path) -> Predict: ...


@dataclass(frozen=True)
class Opened:
    predict: Predict
    compiled_now: bool
    compiled: Path
    """The copy that was opened."""


class CompiledCache:
    """The last few compiled packages by the hash of their content.

    They are in `folder`: the user's cache folder unless it is given.
    """

    def __init__(self, folder: Path | None = None, max_copies: int = MAX_COPIES) -> None:
        self.folder = folder or user_cache_folder() / "compiled"
        self.max_copies = max_copies

    def open(self, package: Path, compiler: Compiler) -> Opened:
        """The package, ready to run; compiled first unless a copy of the same content is there and opens.

        Raises:
            PackageError: it does not compile, or what was compiled does not open.
            OutputError: the cache folder cannot be written.
        """
        place = self.place(package, compiler.version)
        if place.is_dir():
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(RETRY_SECONDS)
                with contextlib.suppress(Exception):  # whatever is wrong with the old copy, a new one replaces it
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
        """The compiled copy, made first unless there is one; it is not opened. Raises what `open` does."""
        place = self.place(package, compiler.version)
        if place.is_dir():
            _mark_used(place)
        else:
            self._compile(package, place, compiler)
        return place

    def place(self, package: Path, version: str) -> Path:
        """Where the compiled copy of this content belongs."""
        digest = package_digest(package, version, self.folder / RECORDS)
        return self.folder / f"{package.stem}-{digest[:20]}.mlmodelc"

    def _evict(self, newest: Path) -> None:
        """Removes the copies used longest ago beyond the bound, and what killed processes left."""
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
        """Compiles beside `place`, then renames: another process never sees half a copy."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=".compiling-", dir=self.folder))
        except OSError as reason:
            raise OutputError(
                f"the cache folder {self.folder} cannot be written ({reason.strerror}); name another in "
                f"{ENVIRONMENT_VARIABLE}"
            ) from reason
        try:
            fresh = workplace / place.name
            try:
                compiler.compile(package, fresh)
            except Exception as reason:  # coremltools raises plain Exception and RuntimeError
                raise PackageError(f"{package} does not compile: {coreml_reason(reason)}") from reason
            if not fresh.is_dir():
                raise PackageError(f"{package} does not compile: nothing was written to {fresh}")
            with contextlib.suppress(OSError):  # another process was faster: its copy has the same content
                fresh.rename(place)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        self._evict(place)


def _mark_used(place: Path) -> None:
    """Records the use in a file of its own: Core ML may take a folder that was touched for a new model."""
    with contextlib.suppress(OSError):  # a cache that only others may write still serves
        place.with_suffix(USED).touch()


def _last_used(place: Path) -> float:
    return _changed(place.with_suffix(USED)) or _changed(place)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another process meanwhile
        return 0.0


def _remove(place: Path) -> None:
    """Removes a copy, and what is recorded of it."""
    shutil.rmtree(place, ignore_errors=True)
    if place.suffix == ".mlmodelc":
        for suffix in (USED, SHARES):
            with contextlib.suppress(OSError):
                place.with_suffix(suffix).unlink(missing_ok=True)


def user_cache_folder() -> Path:
    """FASTVLM_CACHE, else `fastvlm` where the system keeps caches."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastvlm"
