"""Many clients, one model: requests from any thread join a running batch between its steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from ..models.errors import CancelledError, FastVLMError, MachineError, QueueFullError, UnavailableError, UsageError
from .batch import BATCH_SIZE, BatchDecoder, Piece, Row, check_batch_size, outcome_of
from .engine import Engine, PrefillResult, PreparedRequest
from .generate import Generation
from .prompt_cache import CachedPrompt
from .request import Request

MAX_QUEUE = 64
"""Requests that may wait by default. Their prompts and pixels take 3 MB per image at 1024 px."""

PREFILL_POSITIONS = 128
"""Positions of new prompts that are computed between two steps of running answers. A step waits no longer for them."""

Event = Piece | Generation | FastVLMError
"""A part of an answer, or its end."""

Listener = Callable[[Event], None]
"""Called on the engine thread with every part of an answer, and then once with its end. Must return at once."""


@dataclass(frozen=True)
class SchedulerStats:
    """The counts of a scheduler since its start."""

    queued: int = 0
    """Requests that wait now."""
    running: int = 0
    """Answers that are being computed now, with one whose prompt is being read."""
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Positions of prompts that came from the prefix cache. They are among `prompt_tokens`."""
    generated_tokens: int = 0
    cached_images: int = 0
    """Images that did not have to be encoded."""
    cache_bytes: int = 0
    """Keys, values and features that are kept for later prompts now, in bytes."""
    batch: int = 0
    """The number of answers in the last step."""


class Answer:
    """An answer that waits for its turn, is computed, or has ended. Any thread may use it.

    Attributes:
        queue_ms: the time until the prompt was begun, in milliseconds, or until the end without a beginning.
    """

    def __init__(self, scheduler: Scheduler, listener: Listener | None) -> None:
        self.queue_ms = 0.0
        self._scheduler = scheduler
        self._listener = listener
        self._submitted = time.monotonic()
        self._ended = threading.Event()
        self._outcome: Generation | FastVLMError | None = None
        self._cancelled = False
        self._cancellation = CancelledError("the answer was cancelled before its end.")
        self._prepared: PreparedRequest | None = None
        self._unread = Piece("", ())
        """Tokens whose characters are not complete yet."""

    @property
    def done(self) -> bool:
        """True if `result` returns or raises without waiting."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ends the answer. It leaves the queue at once, or the batch before the next step."""
        self._scheduler._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the whole answer, for `timeout` seconds at most.

        Raises:
            TimeoutError: the answer has not ended by then. It continues.
            CancelledError: the answer was cancelled.
            UnavailableError: it could not start in time, or the scheduler was closed.
            FastVLMError: any error of `FastVLM.generate`.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the answer did not end within {timeout} s")
        outcome = self._outcome
        if isinstance(outcome, Generation):
            return outcome
        assert outcome is not None
        raise outcome


class Scheduler:
    """Computes the answers to requests of many threads in one batch, on a thread of its own.

    Requests start in the order in which they were submitted. A new prompt is read in parts between the steps of the
    answers that run. The ids are those of `FastVLM.generate`, on a Mac up to float16 rounding. An encoder process
    encodes the images of waiting requests meanwhile.

    Args:
        engine: the engine of a loaded model, `FastVLM.engine`. Others may use it at the same time.
        batch_size: the most answers that are decoded together.
        max_queue: the most requests that wait for a place among them.
        queue_timeout_s: the longest time that a request waits, in seconds. None waits without limit.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        batch_size: int = BATCH_SIZE,
        max_queue: int = MAX_QUEUE,
        queue_timeout_s: float | None = None,
    ) -> None:
        check_batch_size(batch_size)
        if not isinstance(max_queue, int) or isinstance(max_queue, bool) or max_queue < 1:
            raise UsageError(f"max_queue must be a whole number from 1 (got {max_queue!r:.60}).", "max_queue")
        if queue_timeout_s is not None and not queue_timeout_s > 0:
            raise UsageError(f"queue_timeout_s must be above 0 (got {queue_timeout_s!r:.60}).", "queue_timeout_s")
        self._engine = engine
        self._batch_size = batch_size
        self._max_queue = max_queue
        self._queue_timeout_s = queue_timeout_s
        self._changed = threading.Condition()
        """Guards what follows up to `_decoder`, and is notified of every change."""
        self._preparing = 0
        self._waiting: deque[Answer] = deque()
        self._left: list[Answer] = []
        """Answers that ended while they waited, and whose listeners do not know yet."""
        self._prefilling: Answer | None = None
        self._running: dict[Row, Answer] = {}
        self._searches: dict[Row, Iterator[int | None]] = {}
        """The running answers of beam searches, which have steps of their own."""
        self._stats = SchedulerStats()
        self._accepting, self._closing = True, False
        self._decoder = BatchDecoder(engine, keep_turns=True)
        self._chunks: Generator[int, None, PrefillResult] | None = None
        """The prompt that is being read, of `_prefilling`."""
        self._thread = threading.Thread(target=self._run, name="fastvlm-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: Request, listener: Listener | None = None) -> Answer:
        """Queues a request, whose prompt and images are prepared in the calling thread. This takes milliseconds.

        The listener is called on the engine thread with pieces, and then with one Generation or FastVLMError. An
        exception of a listener cancels its answer.

        Raises:
            QueueFullError: `max_queue` requests are waiting.
            UnavailableError: the scheduler is draining or closed.
        """
        answer = Answer(self, listener)
        with self._changed:
            self._check_accepting()
            if len(self._waiting) + self._preparing >= self._max_queue:
                raise QueueFullError(
                    f"the queue is full (waiting requests: {len(self._waiting)}). Try again later, or raise max_queue.",
                    "max_queue",
                )
            self._preparing += 1
        error: FastVLMError | None = None
        try:
            answer._prepared = self._engine.prepare(request)
        except FastVLMError as reason:
            error = reason
        finally:
            with self._changed:
                self._preparing -= 1
                self._changed.notify_all()
        with self._changed:
            if self._closing:
                self._check_accepting()
            if error is not None:
                self._end_waiting(answer, error)
            else:
                self._waiting.append(answer)
            self._changed.notify_all()
        return answer

    def _check_accepting(self) -> None:
        if not self._accepting:
            raise UnavailableError("the scheduler is closed, or about to be. Send the request to another one.")

    def stats(self) -> SchedulerStats:
        """Returns the counts so far."""
        caches = self._engine.feature_cache.nbytes + self._engine.prefix_cache.nbytes
        with self._changed:
            running = len(self._running) + (self._prefilling is not None)
            return replace(self._stats, queued=len(self._waiting), running=running, cache_bytes=caches)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no more requests, and waits until those that were taken have ended. Returns False after `timeout_s`."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not (self._preparing or self._has_work), timeout_s)

    def close(self) -> None:
        """Cancels all answers and ends the thread. Waits for an image or a step that is being computed."""
        with self._changed:
            self._accepting, self._closing = False, True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._left or self._prefilling or self._running)

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            answer._cancelled = True
            if answer in self._waiting:
                self._waiting.remove(answer)
                self._end_waiting(answer, answer._cancellation)
            self._changed.notify_all()

    def _end_waiting(self, answer: Answer, error: FastVLMError) -> None:
        """Ends an answer that has not begun. The engine thread calls its listener. Needs the lock."""
        answer.queue_ms = 1000 * (time.monotonic() - answer._submitted)
        self._settle(answer, error)
        self._left.append(answer)

    def _settle(self, answer: Answer, outcome: Generation | FastVLMError) -> None:
        """Counts an answer that ended, and wakes those that wait for it. Needs the lock."""
        name = {Generation: "finished", CancelledError: "cancelled"}.get(type(outcome), "failed")
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + 1})
        answer._outcome, answer._prepared = outcome, None
        answer._ended.set()
        self._changed.notify_all()

    def _add(self, **counts: int) -> None:
        """Adds to the counts. Needs the lock."""
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in counts.items()})

    # The rest runs on the engine thread, without the lock unless it says so.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._has_work)
                with self._engine.memory.in_use():
                    while self._has_work and not self._closing:
                        try:
                            self._turn()
                        except Exception as reason:
                            self._fail(self._error(reason))
                if self._closing:
                    return
        finally:
            self._end_all()

    def _turn(self) -> None:
        """Removes answers that were ended from outside, begins new ones, and computes a step."""
        self._sweep()
        self._begin_ready()
        for row in list(self._searches):
            self._search(row)
        if not self._decoder.rows:
            return
        try:
            pieces = self._decoder.step()
        except Exception as reason:
            self._decoder.clear()
            error = self._error(reason)
            for row in [row for row in self._running if row not in self._searches]:
                self._end(self._running[row], error, row)
            return
        with self._changed:
            self._stats = replace(self._stats, batch=len(pieces))
        for row, piece in pieces:
            self._deliver(row, piece)

    def _fail(self, error: FastVLMError) -> None:
        """Ends all answers that have begun. Those that wait are not affected."""
        self._decoder.clear()
        self._searches.clear()
        if self._prefilling is not None:
            self._end(self._prefilling, error)
        for row, answer in list(self._running.items()):
            self._end(answer, error, row)

    def _sweep(self) -> None:
        """Ends answers that were cancelled or have waited too long, and calls the listeners of those that left."""
        limit, now = self._queue_timeout_s, time.monotonic()
        with self._changed:
            for answer in [one for one in self._waiting if limit is not None and now - one._submitted > limit]:
                self._waiting.remove(answer)
                self._end_waiting(answer, UnavailableError(f"the request waited for {limit:g} s. Try again later."))
            left, self._left = self._left, []
            prefilling, rows = self._prefilling, [row for row, answer in self._running.items() if answer._cancelled]
        for answer in left:
            assert answer._outcome is not None
            self._tell(answer, answer._outcome)
        for row in rows:
            self._decoder.leave(row)
            self._end(self._running[row], self._running[row]._cancellation, row)
        if prefilling is not None and prefilling._cancelled:
            self._end(prefilling, prefilling._cancellation)

    def _begin_ready(self) -> None:
        """Reads prompts while the batch has room, up to PREFILL_POSITIONS if other answers wait for a step."""
        positions = 0
        while (positions < PREFILL_POSITIONS or not self._running) and not self._closing:
            if self._prefilling is None and not self._take():
                return
            answer, chunks = self._prefilling, self._chunks
            assert answer is not None and chunks is not None
            self._look_ahead()
            try:
                positions += next(chunks)
            except StopIteration as end:
                prefilled: PrefillResult = end.value
                positions += min(prefilled.prompt_tokens - prefilled.reused_tokens, PREFILL_POSITIONS)
                self._join(answer, prefilled)
            except Exception as reason:
                self._end(answer, self._error(reason))
            self._sweep()

    def _take(self) -> bool:
        """Takes the next request from the queue, unless others run and its images are not encoded yet."""
        self._look_ahead()
        with self._changed:
            if not self._waiting or len(self._running) >= self._batch_size:
                return False
            prepared = self._waiting[0]._prepared
            assert prepared is not None
            if self._running and not prepared.is_encoded:
                return False
            self._prefilling = answer = self._waiting.popleft()
            answer.queue_ms = 1000 * (time.monotonic() - answer._submitted)
        self._chunks = self._engine.prefill_chunks(prepared, CachedPrompt(), answer_capacity=0, chunk=PREFILL_POSITIONS)
        return True

    def _look_ahead(self) -> None:
        """Submits the images of the next few requests to the encoder process."""
        with self._changed:
            upcoming = [self._waiting[n] for n in range(min(len(self._waiting), self._engine.encode_ahead_limit))]
        for answer in upcoming:
            prepared = answer._prepared
            if prepared is None:  # it has just left the queue
                continue
            try:
                self._engine.encode_ahead(prepared)
            except Exception as reason:
                error = self._error(reason)
                with self._changed:
                    if answer in self._waiting:
                        self._waiting.remove(answer)
                        self._end_waiting(answer, error)

    def _join(self, answer: Answer, prefilled: PrefillResult) -> None:
        """Adds an answer whose prompt has been read to the batch, and passes its first token on."""
        assert answer._prepared is not None
        row = Row(self._engine, answer._prepared.request, prefilled)
        with self._changed:
            self._prefilling, self._chunks = None, None
            self._running[row] = answer
            self._add(
                prompt_tokens=prefilled.prompt_tokens,
                cached_tokens=prefilled.reused_tokens,
                cached_images=prefilled.cached_images,
            )
        if prefilled.logits is None:
            self._deliver(row, self._decoder.join(row))
        else:
            self._searches[row] = self._engine.decoded_ids(row.request, prefilled)

    def _search(self, row: Row) -> None:
        """Computes a step of a beam search, or passes its answer on."""
        if row not in self._running:  # cancelled
            del self._searches[row]
            return
        try:
            with self._engine.lock, self._engine.mlx_stream():
                token_id = next(self._searches[row])
        except Exception as reason:
            del self._searches[row]
            self._end(self._running[row], self._error(reason), row)
            return
        if token_id is None:
            return
        rest = self._searches.pop(row)
        while token_id is not None and not row.ended:
            self._deliver(row, row.push(token_id))
            token_id = next(rest, None)

    def _deliver(self, row: Row, piece: Piece) -> None:
        """Passes a token on as soon as its text is complete, and the whole answer after the last."""
        answer = self._running[row]
        answer._unread += piece
        with self._changed:
            self._add(generated_tokens=len(piece.token_ids))
        if piece.text or (row.ended and answer._unread.token_ids):
            whole, answer._unread = answer._unread, Piece("", ())
            self._tell(answer, whole)
        if row.ended:
            self._end(answer, outcome_of(self._engine, row), row)

    def _end(self, answer: Answer, outcome: Generation | FastVLMError, row: Row | None = None) -> None:
        """Ends an answer that has begun: the one in `row`, or the one whose prompt is being read."""
        with self._changed:
            if row is None:
                self._prefilling, self._chunks = None, None
            else:
                del self._running[row]
            self._settle(answer, outcome)
        self._tell(answer, outcome)

    def _end_all(self) -> None:
        """Cancels whatever is left when the thread ends."""
        with self._changed:
            self._accepting, self._closing = False, True
            for answer in self._waiting:
                self._end_waiting(answer, answer._cancellation)
            self._waiting.clear()
            left, self._left = self._left, []
        for answer in left:
            assert answer._outcome is not None
            self._tell(answer, answer._outcome)
        self._fail(CancelledError("the answer was cancelled: the scheduler was closed."))

    def _tell(self, answer: Answer, event: Event) -> None:
        """Calls the listener of an answer. If it raises, the answer is cancelled."""
        if answer._listener is None:
            return
        try:
            answer._listener(event)
        except Exception as reason:
            answer._cancelled, answer._listener = True, None
            answer._cancellation = CancelledError(
                f"the answer was cancelled: its listener raised {type(reason).__name__}: {reason}."
            )

    def _error(self, reason: Exception) -> FastVLMError:
        """Returns a FastVLMError for an error of the computation. Unexpected ones free the memory of the caches."""
        if isinstance(reason, FastVLMError):
            return reason
        self._engine.clear_caches()
        lines = str(reason).splitlines() or [""]
        return MachineError(
            f"the model failed while it computed an answer ({type(reason).__name__}: {lines[0]:.200}). Ask again, with "
            "fewer or shorter prompts at once if memory ran out."
        )
