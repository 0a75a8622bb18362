"""Progress on stderr: one line per stage with its time."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class StageProgress:
    """Prints each stage when it begins and its seconds when the next one does. Used as a context manager."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage: str | None = None
        self._begin = self._stage_begin = time.perf_counter()

    def __call__(self, stage: str) -> None:
        self._finish_stage()
        self._stage, self._stage_begin = stage, time.perf_counter()
        if self._terminal:
            self._write(f"  … {stage}")

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_stage()
        elif self._stage and self._terminal:
            self._write("\n")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._begin

    def _finish_stage(self) -> None:
        if self._stage:
            begin = "\r\x1b[K" if self._terminal else ""
            self._write(f"{begin}  {self._stage:<34} {time.perf_counter() - self._stage_begin:6.1f} s\n")
            self._stage = None

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


MAX_LINE = 600


def note(text: str) -> None:
    """A remark for the user that is no result."""
    sys.stderr.write(f"note: {one_line(text)}\n")


def one_line(text: str) -> str:
    """`text`, which may quote a stranger's file, on one line of bounded length and without control characters."""
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
