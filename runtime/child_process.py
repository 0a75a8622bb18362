"""A child process that encodes images: how it is started, listened to and ended, and that it never outlives this one.

A guard, a shell of a few lines, waits on a pipe that only this process holds open. When this process ends, by SIGKILL
too, the pipe closes and the guard kills the child, whatever native code holds the child's GIL at that time. A thread in
the child could not do that, and Linux' PR_SET_PDEATHSIG is absent on macOS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from ..models import errors
from ..models.errors import FastVLMError, MachineError, PackageError
from ..models.folder_layout import EMBEDS_NAME, OUTPUT_NAME
from .encoders import Shapes
from .frames import MAX_BYTES, FrameError, Frames, send
from .shared_memory import SLOTS, Layout, SharedMemory, reserved_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHILD_MODULE = ("-m", "fastvlm.runtime.encoder_child")

GUARD = 'read child && { read word || kill -9 "$child"; }'
"""Kills the child unless a second line comes before the pipe closes."""

END_SECONDS = 0.3
"""Longest wait for a killed process: a Ctrl-C ends the command within half a second."""

GRACE_SECONDS = 0.5
"""Time in which a process that has closed its pipe ends by itself, and shows how."""

STDERR_LINES = 20
"""Lines that are kept of the child's stderr: native code says why it aborts in its last ones."""

MAX_LINE = 2_000
"""Characters that are kept of a line."""

LAST_WORDS = 200
"""Characters of the last line that an error quotes."""


@dataclass(frozen=True)
class Ending:
    """Why a child is no longer used."""

    kind: Literal["closed", "signal", "exit", "hang", "rubbish", "error"]
    detail: str = ""
    number: int = 0
    """Of the signal, or the exit code."""
    loading: bool = False
    """Whether it ended before the package was loaded."""
    idle: bool = False
    """Whether it ended while it had nothing to do."""
    error: FastVLMError | None = None
    """Why the package does not open."""


class Reply:
    """What the child answers to one order; settled once, by the thread that listens.

    Attributes:
        outcome: a message or features; an error; or, when the child ended, how.
        innocent: whether the child ended before it had begun with this order.
    """

    def __init__(self, number: int, slot: int | None = None) -> None:
        self.number, self.slot = number, slot
        self.outcome: dict[str, Any] | NDArray[Any] | FastVLMError | Ending | None = None
        self.innocent = False
        self.given = time.monotonic()
        self.predict_ms = 0.0
        self._arrived: SimpleQueue[None] = SimpleQueue()

    def settle(self, outcome: dict[str, Any] | NDArray[Any] | FastVLMError | Ending) -> None:
        self.outcome = outcome
        self._arrived.put(None)

    def wait(self, seconds: float) -> None:
        """Returns when it is settled, or after a time. A signal handler may raise out of it."""
        if self.outcome is None:
            with contextlib.suppress(Empty):
                self._arrived.get(timeout=seconds)


class ChildProcess:
    """One run of the child, with its guard and the thread that listens to it.

    Attributes:
        opening: the reply to the first order.
        memory: pixels and features.
        free_slots: parts of the memory that no image uses.
        ending: why it is no longer used; None while it is.
        stage: what loading is at, and since when by `time.monotonic`.

    Raises:
        MachineError: it cannot be started.
    """

    def __init__(self, program: tuple[str, ...], layout: Layout, shapes: Shapes, order: dict[str, Any]) -> None:
        self.opening = Reply(0)
        self.free_slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(SLOTS):
            self.free_slots.put(slot)
        self.ending: Ending | None = None
        self.stage: tuple[str, float] | None = None
        self._shapes = shapes
        self._waiting: dict[int, Reply] = {}
        self._progress = time.monotonic()
        self._said: deque[str] = deque(maxlen=STDERR_LINES)
        self._writing, self._burying = threading.Lock(), threading.Lock()
        self._blamed: Reply | None = None
        self._finished = False
        self._to_child = self._lifeline = self._from_child = self._stderr = -1
        self._guard: subprocess.Popen[bytes] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        _alive.add(self)
        try:
            self._start(program, layout)
            threading.Thread(target=self._listen, name="fastvlm-encoder", daemon=True).start()
        except BaseException as reason:
            self.end()
            self._close("_from_child", "_stderr")
            if isinstance(reason, OSError | RuntimeError):
                raise MachineError(f"the vision encoder's process cannot be started: {reason}") from reason
            raise
        self.give(self.opening, order)

    def _start(self, program: tuple[str, ...], layout: Layout) -> None:
        with contextlib.ExitStack() as given:  # what belongs to the child alone once it runs

            def pipe() -> tuple[int, int]:
                return tuple(map(_above_stdio, os.pipe()))  # type: ignore[return-value]

            memory = _above_stdio(reserved_file(layout.total_bytes))
            given.callback(os.close, memory)
            self.memory = SharedMemory(layout, memory)
            lifeline, self._lifeline = pipe()
            given.callback(os.close, lifeline)
            orders, self._to_child = pipe()
            given.callback(os.close, orders)
            self._from_child, replies = pipe()
            given.callback(os.close, replies)
            self._stderr, stderr = pipe()
            given.callback(os.close, stderr)
            os.set_blocking(self._stderr, False)
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD],
                stdin=lifeline,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._child = subprocess.Popen(
                [sys.executable, "-P", *program, str(orders), str(replies), str(memory)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,  # whatever native code prints is kept from the pipe of replies
                stderr=stderr,
                pass_fds=(orders, replies, memory),
                start_new_session=True,  # the terminal's Ctrl-C is meant for this process
            )
            # Until the guard knows the child, the child only waits for an order, and ends with the pipe.
            os.write(self._lifeline, f"{self._child.pid}\n".encode())

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def last_words(self) -> str:
        """The last line on the child's stderr that says something; empty when there is none."""
        lines = (" ".join(line.split()) for line in reversed(self._said))
        return next((line[:LAST_WORDS] for line in lines if any(c.isalnum() for c in line)), "")

    @property
    def working_since(self) -> tuple[float, bool] | None:
        """Since when it works at something, by `time.monotonic`, and whether that is loading; None while idle."""
        first = next(iter(list(self._waiting.values())), None)
        return None if first is None else (max(first.given, self._progress), first.number == 0)

    def give(self, reply: Reply, order: dict[str, Any]) -> None:
        """Sends an order whose reply will be settled, also when the child ends."""
        with self._writing:
            self._waiting[reply.number] = reply
            sent = self.ending is None and self._to_child >= 0
            if sent:
                try:
                    send(self._to_child, order)
                except OSError:  # it has ended, and the thread that listens will say how
                    sent = False
            reply.innocent = not sent
        if self._finished:
            self._give_up()

    def fail(self, ending: Ending) -> None:
        """Ends the child for a reason that its orders are told."""
        self.ending = self.ending or ending
        self._kill()

    def end(self) -> None:
        """Ends the child at once, and waits until it is gone."""
        self.ending = self.ending or Ending("closed")
        self._bury(kill=True)

    def disown(self) -> None:
        """In a fork of this process: leaves the child to the process that started it."""
        self.ending = self.ending or Ending("closed")
        for process in (self._child, self._guard):
            if process is not None:
                process.returncode = 0  # not to be waited for here
        self._writing, self._burying = threading.Lock(), threading.Lock()
        self._close("_to_child", "_lifeline", "_from_child", "_stderr")
        self._child = self._guard = None

    def _listen(self) -> None:
        """Settles replies until the child's pipe closes, in a thread of its own."""
        frames, poller = Frames(), select.poll()
        poller.register(self._from_child, select.POLLIN)
        poller.register(self._stderr, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poller.poll():
                    if descriptor == self._stderr:
                        if not self._hear():
                            poller.unregister(descriptor)
                        continue
                    chunk = os.read(descriptor, MAX_BYTES)
                    if not chunk:
                        return
                    for message in frames.feed(chunk):
                        self._take(message)
        except (FrameError, LookupError, TypeError, ValueError) as reason:
            self.fail(Ending("rubbish", str(reason), loading=self.opening.outcome is None))
        finally:
            self._finish()

    def _take(self, message: dict[str, Any]) -> None:
        """Follows a message. Raises LookupError, TypeError or ValueError for one that makes no sense."""
        if "stage" in message:
            self.stage = str(message["stage"]), float(message["since"])
            return
        reply = self._waiting[message["id"]]
        outcome: dict[str, Any] | NDArray[Any] | FastVLMError
        if "error" in message:
            outcome = _error_of(message["error"])
            if reply.number == 0:
                self.ending = self.ending or Ending("error", error=outcome, loading=True)
        elif reply.slot is None:
            outcome = dict(message["ready"])
        else:
            shape = tuple(message["shape"])
            if shape not in (self._shapes.output(OUTPUT_NAME), self._shapes.output(EMBEDS_NAME)):
                raise ValueError(f"features of shape {shape}")
            reply.predict_ms = float(message["predict_ms"])
            outcome = self.memory.features(reply.slot, shape).copy()
        self._progress = time.monotonic()
        del self._waiting[reply.number]
        if reply.slot is not None:
            self.free_slots.put(reply.slot)
        reply.settle(outcome)

    def _hear(self) -> bool:
        """Keeps the end of what is on stderr now. False when it is closed."""
        try:
            chunk = os.read(self._stderr, MAX_BYTES)
        except BlockingIOError:
            return True
        begun = self._said.pop() if self._said else ""
        lines = (begun + chunk.decode(errors="replace")).split("\n")
        self._said.extend(line[-MAX_LINE:] for line in lines)
        return bool(chunk)

    def _finish(self) -> None:
        """The child has closed its pipe: finds out how it ended, and tells that to whoever waits."""
        blamed = next(iter(list(self._waiting.values())), None)
        if blamed is not None and blamed.innocent:
            blamed = None
        if self.ending is None or self.ending.kind == "error":
            self._bury(kill=False)
        if self.ending is None:
            code = self._child.returncode if self._child else None
            loading = self.opening.outcome is None
            if code is None:
                ending = Ending("rubbish", "it closed its pipe", loading=loading, idle=blamed is None)
            else:
                kind: Literal["signal", "exit"] = "signal" if code < 0 else "exit"
                ending = Ending(kind, number=abs(code), loading=loading, idle=blamed is None)
            self.ending = self.ending or ending
        self._bury(kill=True)
        with contextlib.suppress(OSError):
            self._hear()
        self._close("_from_child", "_stderr")
        self._blamed, self._finished = blamed, True
        self._give_up()

    def _give_up(self) -> None:
        """Settles what waits with how the child ended; only the first order can have ended it."""
        while self._waiting:
            with contextlib.suppress(KeyError):  # another thread does the same
                number, reply = next(iter(list(self._waiting.items())))
                del self._waiting[number]
                assert self.ending is not None
                loading = self.ending.loading or self.ending.kind == "error"
                reply.innocent = not loading and reply is not self._blamed
                reply.settle(self.ending)

    def _kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(OSError):
                os.kill(self._child.pid, signal.SIGKILL)

    def _bury(self, kill: bool) -> None:
        """Waits for the child's end, which comes by itself or is brought about. The guard goes first.

        Once the child is waited for, its number may be another process's, which the guard must not kill.
        """
        with self._burying:
            if kill:
                self._kill()
            if self._guard is not None:
                with contextlib.suppress(OSError):
                    os.write(self._lifeline, b"\n")
                if not _ended(self._guard, END_SECONDS):
                    self._guard.kill()
                    _ended(self._guard, END_SECONDS)
            if self._child is not None:
                _ended(self._child, END_SECONDS if kill else GRACE_SECONDS)
            with self._writing:
                self._close("_to_child", "_lifeline")

    def _close(self, *names: str) -> None:
        for name in names:
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)


_alive: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def _disown_all() -> None:
    for process in list(_alive):
        process.disown()


os.register_at_fork(after_in_child=_disown_all)  # else a fork would keep the guard's pipe open


def _error_of(described: dict[str, Any]) -> FastVLMError:
    """Returns the error that the child has described."""
    kind, message = getattr(errors, str(described["kind"]), None), str(described["message"])
    if not (isinstance(kind, type) and issubclass(kind, FastVLMError)):
        kind = PackageError
    return kind(message, *map(str, described["arguments"]))


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _above_stdio(descriptor: int) -> int:
    """The descriptor, or another of the same file: what takes the place of stdio in the child would be lost."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)
