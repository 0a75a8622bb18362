"""Running a server: its socket, its connections, and its end.

The port is taken before the model is loaded, so that one in use is reported at once. Clients can connect only once the
model is ready. SIGINT or SIGTERM lets running answers end. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...models.errors import MachineError
from ..fastvlm import FastVLM
from ..scheduler import Scheduler
from .app import Service
from .settings import Settings

HEADER_SECONDS = 10.0
"""The time that a connection has to send the headers of a request. Each costs a file descriptor meanwhile."""

IDLE_SECONDS = 60
"""The time for which a connection without requests is kept."""

MAX_CONNECTIONS = 512
"""Open connections. Further ones get the status 503. Systems allow a process 1024 open files or more."""

MARGIN_SECONDS = 5
"""The time for the last bytes of answers that were ended when the server stops."""

M_ARENA_MAX = -8
"""The parameter of glibc's `mallopt` that bounds the number of arenas (malloc.h)."""

BACKLOG = 128
"""Connections that the system keeps until they are accepted."""


def bind(settings: Settings) -> socket.socket:
    """Returns a socket at the address of `settings`, which does not listen yet.

    Raises:
        MachineError: the address is in use, or is not one of this machine.
    """
    address = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = found[0]
        # asyncio sends small packets at once (TCP_NODELAY) only for sockets that name their protocol.
        listener = socket.socket(family, kind, protocol)
    except OSError as reason:
        raise MachineError(f"cannot listen on {address}: {reason.strerror or reason}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as reason:
        listener.close()
        if reason.errno == errno.EADDRINUSE:
            raise MachineError(
                f"port {settings.port} of {settings.host} is in use by another program. Choose another port.", "port"
            ) from None
        raise MachineError(f"cannot listen on {address}: {reason.strerror or reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Returns the URL of a server, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(model: FastVLM, settings: Settings, listener: socket.socket, on_ready: Callable[[Server], None]) -> None:
    """Serves a model until it is asked to stop. `on_ready` is called once clients can connect.

    `Server.stop` stops it, and in the main thread SIGINT and SIGTERM do. Running answers then have
    `settings.stop_timeout_s` to end.
    """
    _share_malloc_arena()
    # The service counts requests, with those that run. A burst waits in the scheduler until they do.
    with Scheduler(model.engine, settings.batch_size, settings.max_in_flight) as scheduler:
        service = Service(model, scheduler, settings)
        try:
            Server(service, on_ready).run([listener])
        finally:
            service.close()


def _share_malloc_arena() -> None:
    """Lets threads that start from now on allocate from the main thread's arena. Does nothing without glibc.

    By default each thread has an arena that returns freed memory to the system. The scheduler's thread would fetch the
    activations of an encoder again for every image, page by page.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)


class Server(uvicorn.Server):
    """A running server: uvicorn with a graceful stop of its own.

    Attributes:
        url: the address, without a path. Empty until clients can connect.
        service: the routes and their state.
    """

    def __init__(self, service: Service, on_ready: Callable[[Server], None]) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # `_Log` reports what happens
        config = uvicorn.Config(
            service.app(),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=IDLE_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(service.settings.stop_timeout_s) + MARGIN_SECONDS,
        )
        super().__init__(config)
        self.url = ""
        self.service = service
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        assert sockets is not None
        self.url = url_of(sockets[0])
        self._on_ready(self)

    def stop(self) -> None:
        """Refuses further requests, and ends the answers that have not ended in time. From any thread, at once."""
        self.service.stopping = True
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self.should_exit = True
        self._loop.call_later(self.service.settings.stop_timeout_s, self.service.stop_answers)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at the first signal, and exits at the second."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.service.stopping:
                os._exit(128 + number)
            self.stop()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Connection(H11Protocol):
    """A connection that is closed if its headers take too long, and whose application can cut it off."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect_headers()
        elif self._due is not None:
            self._due.cancel()
            self._due = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(HEADER_SECONDS, self._headers_overdue)

    def _headers_overdue(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()
