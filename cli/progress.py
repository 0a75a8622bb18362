"""Progress on stderr: one line per stage with its time."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


class StageProgress:
    """A context manager that prints each stage when it begins, and its seconds when it ends."""

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
        """The seconds since the beginning."""
        return time.perf_counter() - self._begin

    def _finish_stage(self) -> None:
        if self._stage:
            begin = "\r\x1b[K" if self._terminal else ""
            self._write(f"{begin}  {self._stage:<34} {time.perf_counter() - self._stage_begin:6.1f} s\n")
            self._stage = None

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


WAIT_SECONDS = 10.0
"""Time between two lines about one wait, where stderr is not a terminal."""


class LoadProgress:
    """A context manager that prints what loading waits for: a line that is updated on a terminal, else one per 10 s."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False

    def __call__(self, text: str, seconds: float) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K  {text} {seconds:.0f} s")
            self._shown = True
        elif seconds >= self._next:
            sys.stderr.write(f"  {text} {seconds:.0f} s\n")
            self._next = seconds + WAIT_SECONDS
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\n")
            sys.stderr.flush()


class CountProgress:
    """A context manager that shows a bar on a terminal, or prints a line per tenth elsewhere.

    `what` is the plural of the counted thing.
    """

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._count = 0
        self._begin = time.perf_counter()
        self._bar = _rich_bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("", total=total, remark="") if self._bar else None

    def advance(self, remark: str = "") -> None:
        """Counts one more. `remark` describes all so far."""
        self._count += 1
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=1, remark=remark)
        elif self._count == 1 or 10 * self._count // self._total > 10 * (self._count - 1) // self._total:
            seconds = time.perf_counter() - self._begin
            remark = f"{remark}, " if remark else ""
            self.say(f"  {self._count:,} of {self._total:,} {self._what}, {remark}{seconds:.0f} s")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar:
            self._bar.console.out(line, highlight=False)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


class RateProgress(CountProgress):
    """Counts with the rate and the time left. Elsewhere than on a terminal it prints a line per 10 s.

    `total` may be None if it is not known, or an estimate.
    """

    def __init__(self, total: int | None, what: str) -> None:
        super().__init__(total or 0, what)
        if self._bar and self._task is not None and total is None:
            self._bar.update(self._task, total=None)
        self._known_total, self._next = total, 0.0
        self._remark, self._said = "", 0

    def advance(self, remark: str = "") -> None:
        """Counts one more. `remark` describes all so far."""
        self._count += 1
        self._remark = remark
        seconds = time.perf_counter() - self._begin
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=1, remark=", ".join(self._texts(seconds)))
        elif seconds >= self._next:
            self._next = seconds + WAIT_SECONDS
            self._say_count(seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if not self._bar and self._said < self._count:
            self._say_count(time.perf_counter() - self._begin)

    def _texts(self, seconds: float) -> list[str]:
        rate = self._count / max(seconds, 1e-9)
        texts = [text for text in (self._remark, f"{rate:,.2f} {self._what}/s") if text]
        total = self._known_total
        if not self._bar and total is not None and total > self._count:  # the bar has a column for it
            texts.append(f"{duration((total - self._count) / rate)} left")
        return texts

    def _say_count(self, seconds: float) -> None:
        self._said = self._count
        of = "" if self._known_total is None else f" of {max(self._known_total, self._count):,}"
        self.say(f"  {self._count:,}{of} {self._what}, {', '.join(self._texts(seconds))}")


def duration(seconds: float) -> str:
    """Returns a time as `1 h 02 min`, `3 min` or `4 s`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class QuestionProgress(CountProgress):
    """Counts questions, and shows the share of right answers."""

    def __init__(self, total: int) -> None:
        super().__init__(total, "questions")
        self._score = 0.0

    def __call__(self, score: float) -> None:
        """Counts an answer with a score from 0 to 1."""
        self._score += score
        self.advance(f"{self._score / (self._count + 1):.1%} right")


def _rich_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[remark]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


MAX_LINE = 600
"""The most characters of a message: longer than any of fastvlm's own, shorter than a screen."""


def note(text: str) -> None:
    """Prints a remark for the user on stderr."""
    sys.stderr.write(f"note: {one_line(text)}\n")


def one_line(text: str) -> str:
    """Returns untrusted text on one line of bounded length, without control characters."""
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


def megabytes(count: int) -> str:
    """Returns a number of bytes in MB."""
    return f"{count / 1e6:,.1f} MB"
