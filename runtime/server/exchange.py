"""One answer on its way from the engine's thread to a client that may be slow, silent or gone.

The engine never waits for a client. Its pieces go into a bounded buffer, which the event loop empties. Only the first
text of a stream is handed to the connection before the next step begins. A client that disconnects, stops reading or
exceeds its time loses its answer, and its place in the batch is free at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from starlette.types import Message, Receive, Scope, Send

from ...models.errors import FastVLMError
from ..generate import Generation
from ..request import Request
from ..scheduler import Answer, Piece, Scheduler
from .errors import ApiError, from_library

MAX_WAITING_PIECES = 1024
"""Pieces of an answer that wait for a client. The connection itself holds some 100 kB, hundreds of pieces more."""

SEND_SECONDS = 30.0
"""The time that a client has to take some bytes. It is the usual limit of a proxy."""

STATUS_SECONDS = 10.0
"""The time for which a streamed answer waits for its first token, so that an error still has its status."""

KEEP_ALIVE_SECONDS = 10.0
"""The time between two comments in a stream without tokens, so that proxies keep the connection."""

FIRST_TEXT_SECONDS = 0.02
"""The longest time that the engine gives the event loop to send the first text of a stream, which takes it about 1 ms.

Without it the loop competes with the next step for the interpreter and the cores, and the time to first token contains
most of that step.
"""

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):  # noqa: N818 - not an error of the server
    """The client has disconnected, or does not read."""


class Exchange:
    """An answer that is being computed for one client.

    It belongs to the event loop that made it. Only `_listen` runs on the engine's thread, and `submit` on any.

    Attributes:
        answer: the scheduler's side of it, once it was submitted.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._preprocess_ms = 0.0
        self._streams = False
        self._timeout_s = timeout_s
        self._deadline = math.inf
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._first_sent = threading.Event()
        self._pieces: list[Piece] = []
        self._end: Generation | FastVLMError | Exception | None = None
        self.answer: Answer | None = None

    def submit(self, scheduler: Scheduler, request: Request, *, streams: bool, preprocess_ms: float = 0.0) -> None:
        """Submits the request, from any thread. `preprocess_ms` is the time that its images took before.

        Raises:
            UnavailableError: the queue is full, or the scheduler is about to end.
        """
        self._streams, self._preprocess_ms = streams, preprocess_ms
        self._deadline = time.monotonic() + self._timeout_s
        answer = scheduler.submit(request, self._listen)
        with self._lock:
            self.answer = answer
            stopped = self._end is not None and not isinstance(self._end, Generation)
        if stopped:
            answer.cancel()

    @property
    def queue_ms(self) -> float:
        """The time that the request waited, in milliseconds."""
        return self.answer.queue_ms if self.answer else 0.0

    async def next(self, seconds: float) -> Piece | Generation | None:
        """Returns what has come, or the whole answer at its end, or None if nothing comes in time.

        Raises:
            ApiError: the answer failed, or took too long.
            ClientGone: the client has left.
        """
        left = self._deadline - time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), max(0.0, min(seconds, left)))
        with self._lock:
            self._ready.clear()
            piece, end = sum(self._pieces, Piece("", ())), self._end
            self._pieces.clear()
            if end is not None:
                self._ready.set()  # for the next call, which returns it again
        if isinstance(end, FastVLMError):
            raise from_library(end)
        if isinstance(end, Exception):
            raise end
        if piece.text or piece.logprobs:
            return piece
        if end is not None:
            return end
        if time.monotonic() >= self._deadline:
            self.cancel()
            raise ApiError(
                504, f"the answer took more than {self._timeout_s:g} s. Ask for fewer tokens.", code="timeout"
            )
        return None

    def sent(self) -> None:
        """Tells the engine that a text has been handed to the connection."""
        self._first_sent.set()

    @property
    def generation(self) -> Generation | None:
        """The whole answer, or None if it has not ended, or failed."""
        return self._end if isinstance(self._end, Generation) else None

    async def result(self) -> Generation:
        """Returns the whole answer. Raises as `next` does."""
        while True:
            event = await self.next(self._timeout_s)
            if isinstance(event, Generation):
                return event

    def stop(self, reason: Exception) -> None:
        """Ends the answer with an error, and frees its place in the batch. Nothing happens if it has ended already."""
        with self._lock:
            if self._end is None:
                self._end = reason
        self._ready.set()
        self._first_sent.set()
        self.cancel()

    def cancel(self) -> None:
        """Frees the answer's place in the batch. Nothing happens if it has ended already."""
        with self._lock:
            answer = self.answer
        if answer is not None:
            answer.cancel()

    def _listen(self, event: Piece | Generation | FastVLMError) -> None:
        """Takes a piece or the end of the answer, on the engine's thread."""
        with self._lock:
            if isinstance(event, Generation):
                self._end = self._end or _with_preprocess(event, self._preprocess_ms)
            elif isinstance(event, FastVLMError):
                self._end = self._end or event
            elif self._streams and self._end is None:
                self._pieces.append(event)
            too_slow = len(self._pieces) > MAX_WAITING_PIECES
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if too_slow:
                self._loop.call_soon_threadsafe(self.stop, ClientGone())
            else:
                self._loop.call_soon_threadsafe(self._ready.set)
                if self._streams and isinstance(event, Piece) and not self._first_sent.is_set():
                    self._first_sent.wait(FIRST_TEXT_SECONDS)
                    self._first_sent.set()


def _with_preprocess(generation: Generation, milliseconds: float) -> Generation:
    """Returns an answer whose preprocessing took that much longer."""
    timings = generation.timings
    return replace(generation, timings=replace(timings, preprocess_ms=timings.preprocess_ms + milliseconds))


class AnswerResponse:
    """The response with an answer: whole, or as a stream of server-sent events.

    Args:
        exchange: the answer.
        whole: makes the body of a whole answer.
        events: makes the events of a stream: for its start (None), for each piece, and for its end. None sends the
            answer whole.
        finished: called once, when nothing more is sent.
    """

    def __init__(
        self,
        exchange: Exchange,
        whole: Callable[[Generation], bytes],
        events: Callable[[Piece | Generation | None], list[bytes]] | None,
        finished: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._whole = whole
        self._events = events
        self._finished = finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_until_disconnect(receive))
        watcher.add_done_callback(lambda _: self._exchange.stop(ClientGone()))
        write = _Writer(scope, send)
        try:
            if self._events is None:
                write.start("application/json")
                await write(self._whole(await self._exchange.result()), last=True)
            else:
                await self._stream(write, self._events)
        except ClientGone:
            write.abort()
        finally:
            self._exchange.cancel()
            watcher.cancel()
            self._finished()

    async def _stream(self, write: _Writer, events: Callable[[Piece | Generation | None], list[bytes]]) -> None:
        first = await self._exchange.next(STATUS_SECONDS)
        write.start("text/event-stream; charset=utf-8")
        try:
            await write(*map(_event, events(None)))
            async for piece in self._pieces(first):
                await write(*(map(_event, events(piece)) if piece is not None else [KEEP_ALIVE]))
                if piece is not None:
                    self._exchange.sent()
            await write(DONE, last=True)
        except ApiError as error:  # too late for a status
            await write(_event(error.body().model_dump_json().encode()), last=True)

    async def _pieces(self, first: Piece | Generation | None) -> AsyncIterator[Piece | Generation | None]:
        event = first
        while True:
            yield event
            if isinstance(event, Generation):
                return
            event = await self._exchange.next(KEEP_ALIVE_SECONDS)


class _Writer:
    """Sends to a client within a time per piece. The headers go with the first bytes, so that an error can precede."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._start: Message | None = None

    def start(self, media_type: str) -> None:
        """Chooses the type of the body. The status is 200."""
        headers = [(b"content-type", media_type.encode())]
        self._start = {"type": "http.response.start", "status": 200, "headers": headers}

    async def __call__(self, *parts: bytes, last: bool = False) -> None:
        """Sends parts of the body. Raises ClientGone if the client takes no bytes."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                if self._start is not None:
                    start, self._start = self._start, None
                    await self._send(start)
                await self._send({"type": "http.response.body", "body": b"".join(parts), "more_body": not last})
        except (TimeoutError, OSError):
            raise ClientGone from None

    def abort(self) -> None:
        """Closes the connection without waiting for the client to read."""
        abort = self._scope.get("state", {}).get("abort")
        if abort is not None:
            abort()


def _event(content: bytes) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + content + b"\n\n"


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
