"""Captions for the images of a folder: one JSON line each, in a file from which an interrupted run resumes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from ..models.errors import FastVLMError, ImageError, OutputError, PackageError, UsageError
from ..models.folder_layout import CONFIG_NAME, MANIFEST_NAME
from ..models.images import SUFFIXES
from .batch import Batch
from .generate import Generation
from .request import Request, prepare

if TYPE_CHECKING:
    from .fastvlm import FastVLM

MAX_BYTES = 2**30
"""The largest file of captions that is read, in bytes: a million captions."""


def image_files(folder: Path) -> list[Path]:
    """Returns the images in a folder and its subfolders by suffix, without hidden ones, in the order of their names.

    Raises:
        ImageError: the folder does not exist, or has no images.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder. Name a folder of images.")
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        raise ImageError(f"{folder} has no images. Their names must end in one of {' '.join(SUFFIXES)}.")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def run_digest(model: Path, prompt: str, options: Mapping[str, Any]) -> str:
    """Returns a digest of a model, a prompt and options, which identifies the captions of one run."""
    described = next((path for path in (model / MANIFEST_NAME, model / CONFIG_NAME) if path.is_file()), None)
    digest = hashlib.sha256(described.read_bytes() if described else b"")
    digest.update(json.dumps([prompt, dict(options)], sort_keys=True).encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


class CaptionFile:
    """A file of captions by image, appended line by line under a lock. Used as a context manager.

    A last line that was cut off by a kill or a full disk is removed. A new file that stays empty is deleted.

    Attributes:
        done: for each image that has a line, True if the line has an error.

    Raises:
        OutputError: the file cannot be written, or another process writes it.
        UsageError: the file has other content, or captions of another run.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._run = run
        self._locked = False
        try:
            self._made = made_now(path)
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as reason:
            raise OutputError(f"{path} cannot be written: {reason.strerror}") from None
        try:
            self._check_file()
            self._lock()
            self.done = self._read()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, file: str, entry: Mapping[str, Any]) -> None:
        """Appends the line of `file`. Raises OutputError."""
        line = json.dumps({"file": file, **entry, "run": self._run}, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as reason:
            raise OutputError(
                f"{self.path} cannot be written: {reason.strerror}. Run the same command again to resume."
            ) from None
        self.done[file] = "error" in entry

    def _check_file(self) -> None:
        """Checks the kind and size of the file before it is read."""
        found = os.fstat(self._file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OutputError(f"{self.path} is not a regular file. Name a file that captions can be appended to.")
        if found.st_size > MAX_BYTES:
            raise UsageError(
                f"{self.path} must have at most {MAX_BYTES:,} bytes (got {found.st_size:,}). Name another file."
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self.path} is being written by another process. Let it finish.") from None
        self._locked = True
        if not self._is_in_place():  # the process that made the file may delete it between opening and locking
            raise OutputError(f"{self.path} was removed by another process just now. Run the same command again.")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def _read(self) -> dict[str, bool]:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        torn = lines.pop()
        done = {}
        for number, line in enumerate(lines, 1):
            file, failed = self._parsed(line, number)
            done[file] = failed
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        return done

    def _parsed(self, line: bytes, number: int) -> tuple[str, bool]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or "run" not in entry:
            raise UsageError(
                f"{self.path}: line {number} is not a caption written by fastvlm. Name another file for the output."
            )
        if entry["run"] != self._run:
            raise UsageError(
                f"{self.path} has captions of another model, prompt or options. Name another file, or remove it."
            )
        return entry["file"], "error" in entry

    def _close(self) -> None:
        with self._file:  # only the process that has the lock may delete the file
            empty = os.fstat(self._file.fileno()).st_size == 0
            if self._made and self._locked and empty and self._is_in_place():
                self.path.unlink(missing_ok=True)


def made_now(path: Path) -> bool:
    """Makes an empty file and returns True, or returns False if the name is in use. Raises OSError."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Captioned:
    """The outcome of one image."""

    file: str
    error: str | None


class Captions:
    """The images of a folder that have no line in a file yet.

    Attributes:
        total: the number of images in the folder.
        waiting: the images without a line.
    """

    def __init__(self, folder: Path, prompt: str, out: CaptionFile, options: Mapping[str, Any]) -> None:
        files = image_files(folder)
        self._named = {label(path.relative_to(folder)): path for path in files}
        self._prompt, self._out, self._options = prompt, out, options
        self.total = len(self._named)
        self.waiting: Sequence[str] = [name for name in self._named if name not in out.done]

    @property
    def failures(self) -> int:
        """The number of images whose line has an error, from this run or an earlier one."""
        return sum(self._out.done.get(name, False) for name in self._named)

    def write(self, model: FastVLM, batch_size: int) -> Iterator[Captioned]:
        """Captions the waiting images, `batch_size` at a time, and yields each outcome once its line is written.

        An image that cannot be opened or encoded gets a line with an error. Raises FastVLMError for anything else.
        """
        outcomes = Batch(model.engine, batch_size).outcomes(self._requests())
        for name, outcome in zip(self.waiting, outcomes, strict=True):
            if isinstance(outcome, Generation):
                self._out.add(name, entry_of(outcome))
                yield Captioned(name, None)
            elif isinstance(outcome, ImageError | PackageError):
                self._out.add(name, {"error": str(outcome)})
                yield Captioned(name, str(outcome))
            else:
                raise outcome

    def _requests(self) -> Iterator[Request | FastVLMError]:
        for name in self.waiting:
            try:
                yield prepare(self._named[name], self._prompt, **self._options)
            except ImageError as reason:
                yield reason


def label(path: Path) -> str:
    """Returns a relative path as a string, with bytes that are not UTF-8 escaped."""
    return path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")


def entry_of(generation: Generation) -> dict[str, Any]:
    """Returns the content of an answer's line."""
    return {
        "text": generation.text,
        "tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "timings": generation.timings.as_dict(),
    }
