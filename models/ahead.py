"""Results of calls that threads make a few ahead, in the order of the calls.

Pillow and hashing release the GIL, so that images are decoded on several cores while the caller computes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

MAX_WORKERS = 4
"""The most threads by default. Four decode more photos than an encoder takes, and other cores stay free."""


def default_workers() -> int:
    """Returns one thread per core, and at most MAX_WORKERS."""
    return min(MAX_WORKERS, os.cpu_count() or 2)


class Ahead(Generic[T]):
    """An iterator over the results of `calls`, of which up to `limit` are made before their turn.

    `calls` is read in the thread of the iteration. A call that raises does so in its turn. Used as a context manager,
    which ends the threads.
    """

    def __init__(self, calls: Iterable[Callable[[], T]], workers: int | None = None, limit: int | None = None) -> None:
        workers = workers or default_workers()
        self._limit = max(limit or 0, workers)
        self._calls = iter(calls)
        self._more = True
        self._results: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(workers, "fastvlm-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Returns the next result, and waits for it."""
        self._submit()
        if not self._results:
            raise StopIteration
        result = self._results.popleft().result()
        self._submit()
        return result

    @property
    def is_ready(self) -> bool:
        """True if `next` does not wait for a call."""
        self._submit()
        return not self._results or self._results[0].done()

    def _submit(self) -> None:
        while self._more and len(self._results) < self._limit:
            call = next(self._calls, None)
            if call is None:
                self._more = False
            else:
                self._results.append(self._pool.submit(call))
