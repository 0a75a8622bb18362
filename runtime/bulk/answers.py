"""Answers about a stream of subjects: requests are prepared in threads, encoded ahead and answered in a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...models.ahead import Ahead, default_workers
from ...models.errors import FastVLMError
from ..batch import Batch
from ..engine import Engine, PreparedRequest
from ..generate import Generation

T = TypeVar("T")

AHEAD_PER_WORKER = 2
"""The subjects per thread that are prepared ahead, in addition to those of a whole batch, which may end at once. An
image takes up to 3 MB, once it is scaled to 1024 px."""


@dataclass(frozen=True)
class Asked(Generic[T]):
    """A subject, such as an image, with its requests. An answer or an error in place of a request passes through."""

    subject: T
    requests: tuple[PreparedRequest | Generation | FastVLMError, ...]


@dataclass(frozen=True)
class Answered(Generic[T]):
    """A subject with an answer or an error for each of its requests."""

    subject: T
    outcomes: tuple[Generation | FastVLMError, ...]


def answers(
    engine: Engine, subjects: Iterable[Callable[[], Asked[T]]], batch_size: int, workers: int | None = None
) -> Iterator[Answered[T]]:
    """Yields the answers about each subject, in their order, and holds no more subjects than are in work.

    Each of `subjects` is called in one of `workers` threads (default: one per core, at most 4), so that images are
    decoded and scaled there. Answers that run never wait for an image.
    """
    workers = workers or default_workers()
    with Ahead(subjects, workers, batch_size + AHEAD_PER_WORKER * workers) as ahead:
        requests = Requests(ahead)
        outcomes: list[Generation | FastVLMError] = []
        for outcome in Batch(engine, batch_size).outcomes(requests):
            outcomes.append(outcome)
            subject, count = requests.taken[0]
            if len(outcomes) == count:
                requests.taken.popleft()
                yield Answered(subject, tuple(outcomes))
                outcomes = []


class Requests(Generic[T]):
    """An iterator over the requests of subjects, which a batch can ask whether the next one is ready.

    Attributes:
        taken: the subjects whose requests were taken, with their number.
    """

    def __init__(self, ahead: Ahead[Asked[T]]) -> None:
        self.taken: deque[tuple[T, int]] = deque()
        self._ahead = ahead
        self._rest: deque[PreparedRequest | Generation | FastVLMError] = deque()

    def __iter__(self) -> Iterator[PreparedRequest | Generation | FastVLMError]:
        return self

    def __next__(self) -> PreparedRequest | Generation | FastVLMError:
        if not self._rest:
            asked = next(self._ahead)
            self.taken.append((asked.subject, len(asked.requests)))
            self._rest.extend(asked.requests)
        return self._rest.popleft()

    @property
    def is_ready(self) -> bool:
        """True if `next` does not wait for an image."""
        return bool(self._rest) or self._ahead.is_ready
