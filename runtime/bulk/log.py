"""The log of a run: one JSON line per image, from which an interrupted run resumes. Every output has one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ...models.errors import OutputError, UsageError
from ...models.folder_layout import CONFIG_NAME, MANIFEST_NAME

MAX_LINE_BYTES = 2**24
"""The longest line that is read, in bytes. An answer that fills the context takes less than a mebibyte."""


def run_digest(model: Path, prompts: Sequence[str], options: Mapping[str, Any]) -> str:
    """Returns a digest of a model, prompts and options, which identifies the captions of one run."""
    described = next((path for path in (model / MANIFEST_NAME, model / CONFIG_NAME) if path.is_file()), None)
    digest = hashlib.sha256(described.read_bytes() if described else b"")
    digest.update(json.dumps([list(prompts), dict(options)], sort_keys=True).encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


def key_digest(key: str) -> int:
    """Returns 64 bits of a key's hash, the same on every machine. It is never 0."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="backslashreplace"), digest_size=8).digest(), "little") or 1


class KeySet:
    """A set of keys in 12 to 24 bytes per key: a table of 64-bit digests.

    Two of a million keys share a digest with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._count = 0
        self._table = array("Q", bytes(8 * 1024))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        digest = key_digest(key)
        return self._table[self._place(self._table, digest)] == digest

    def add(self, key: str) -> bool:
        """Adds a key. Returns False if it was in the set."""
        if 3 * self._count >= 2 * len(self._table):
            self._grow()
        digest = key_digest(key)
        place = self._place(self._table, digest)
        if self._table[place] == digest:
            return False
        self._table[place] = digest
        self._count += 1
        return True

    def _grow(self) -> None:
        larger = array("Q", [0]) * (2 * len(self._table))
        for digest in self._table:
            if digest:
                larger[self._place(larger, digest)] = digest
        self._table = larger

    @staticmethod
    def _place(table: array[int], digest: int) -> int:
        """Returns the place of a digest, or the free one where it belongs."""
        mask = len(table) - 1
        place = digest & mask
        while table[place] not in (0, digest):
            place = (place + 1) & mask
        return place


class CaptionLog:
    """A file of captions by image, appended line by line under a lock. Used as a context manager.

    A last line that was cut off by a kill or a full disk is removed. A new file that stays empty is deleted. The file
    is read in one pass, and only digests of its keys stay in memory.

    Attributes:
        done: the keys that have a line.
        failures: the number of lines with an error.
        last: the content of the last line, or None.
        keep_empty: True if a new file stays, because other files depend on it.

    Raises:
        OutputError: the file cannot be written, or another process writes it.
        UsageError: the file has other content, or captions of another run.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.done = KeySet()
        self.failures = 0
        self.last: dict[str, Any] | None = None
        self.keep_empty = False
        self._run = run
        self._locked = False
        try:
            self._made = made_now(path)
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as reason:
            raise OutputError(f"{path} cannot be written: {reason.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise OutputError(f"{path} is not a regular file. Name a file that captions can be appended to.")
            self._lock()
            self._read()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> CaptionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Appends the line of `key`. Raises OutputError."""
        line = json.dumps({"file": key, **entry, "run": self._run}, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as reason:
            raise OutputError(
                f"{self.path} cannot be written: {reason.strerror}. Run the same command again to resume."
            ) from None
        self.done.add(key)
        self.failures += "error" in entry

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yields the content of every line, one at a time."""
        for number, line in enumerate(self._lines(), 1):
            yield self._parsed(line, number)

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

    def _lines(self) -> Iterator[bytes]:
        """Yields the lines, the last one perhaps without its newline."""
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise UsageError(
                        f"{self.path}: line {number} must have less than {MAX_LINE_BYTES:,} bytes. Name another file."
                    )
                yield line

    def _read(self) -> None:
        end = 0
        for number, line in enumerate(self._lines(), 1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                break
            self.last = self._parsed(line, number)
            self.done.add(self.last["file"])
            self.failures += "error" in self.last
            end += len(line)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
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
        return entry

    def _close(self) -> None:
        with self._file:  # only the process that has the lock may delete the file
            empty = os.fstat(self._file.fileno()).st_size == 0 and not self.keep_empty
            if self._made and self._locked and empty and self._is_in_place():
                self.path.unlink(missing_ok=True)


def made_now(path: Path) -> bool:
    """Makes an empty file and returns True, or returns False if the name is in use. Raises OSError."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
