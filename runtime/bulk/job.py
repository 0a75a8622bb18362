"""A bulk run: the images that have no caption yet, through the pipeline, into an output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ...models.errors import ImageError
from .log import CaptionLog
from .outputs import Output
from .pipeline import Row
from .sources import Item


class RowMaker(Protocol):
    """A captioner: `pipeline.Captioner` in this process, or `ray_pool.RayCaptioner` on a cluster."""

    def rows(self, items: Iterable[Item]) -> Iterator[Row]:
        """Yields a row for each image, in their order."""
        ...


@dataclass(frozen=True)
class Captioned:
    """The outcome of one image."""

    key: str
    error: str | None


class Job:
    """A run that resumes where an earlier one ended. Used as a context manager, which locks the output.

    `run` identifies the model, prompts and options (see `run_digest`).

    Attributes:
        seen: the number of images that the source has yielded so far.
        known: the number of those that had a line before, or whose key occurred before.
        log: the log of the output.
        written: the number of lines that were there before.

    Raises:
        OutputError: the output cannot be written, or another process writes it.
        UsageError: the output has other content, or captions of another run.
    """

    def __init__(self, source: Iterable[Item], output: Output, run: str) -> None:
        self.seen = self.known = 0
        self.log = CaptionLog(output.log_path, run)
        self.written = len(self.log.done)
        self._output = output
        self._source = iter(source)
        self._first: Item | None = None
        try:
            output.begin(self.log)
        except BaseException:
            self.log.__exit__(None, None, None)
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.__exit__(kind, error, trace)

    @property
    def failures(self) -> int:
        """The number of images whose line has an error, from this run or an earlier one."""
        return self.log.failures

    @property
    def is_complete(self) -> bool:
        """True if no image waits. It reads the source up to the first that does."""
        if self._first is None:
            self._first = next(self._waiting(), None)
        return self._first is None

    def captions(self, captioner: RowMaker) -> Iterator[Captioned]:
        """Captions the images that wait, and yields each outcome once it is written.

        Raises:
            OutputError: the output cannot be written.
            FastVLMError: anything else that is not about a single image.
        """
        for row in captioner.rows(self._items()):
            yield self._add(row)

    def end(self) -> None:
        """Completes the output, once there is nothing left to caption. Raises OutputError."""
        self._output.end(self.log)

    def _items(self) -> Iterator[Item]:
        if not self.is_complete:
            assert self._first is not None
            yield self._first
            self._first = None
            yield from self._waiting()

    def _waiting(self) -> Iterator[Item]:
        """Yields the images without a line whose output can be written. Keys in work are noted with those done."""
        for item in self._source:
            self.seen += 1
            if not self.log.done.add(item.key):
                self.known += 1
                continue
            refused = self._output.refusal(item.key)
            yield item if refused is None else Item(item.key, refusing(refused))

    def _add(self, row: Row) -> Captioned:
        return Captioned(row.key, self._output.add(self.log, row.key, row.entry, row.image))


def refusing(reason: str) -> Callable[[], Path | bytes]:
    """Returns a loader that raises ImageError."""

    def load() -> Path | bytes:
        raise ImageError(reason)

    return load
