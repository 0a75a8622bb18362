"""A child process that encodes images: its start, its messages and its end. It never outlives this process.

A guard, a shell of a few lines, waits on a pipe that only this process has open. When this process ends, even by
SIGKILL, the pipe closes and the guard kills the child, even while native code holds the child's GIL. A thread in the
child could not do that, and macOS does not have Linux's PR_SET_PDEATHSIG.
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
from .transport import MAX_BYTES, SLOTS, FrameError, Frames, Layout, SharedMemory, reserved_file, send

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHILD_MODULE = ("-m", "fastvlm.runtime.encoder_child")
"""The arguments of Python that run the child."""

GUARD = 'read child && { read word || kill -9 "$child"; }'
"""A shell script that kills the child unless a second line arrives before the pipe closes."""

END_SECONDS = 0.3
"""The longest wait for a killed process, in seconds. Ctrl-C must end a command within half a second."""

GRACE_SECONDS = 0.5
"""The time in seconds in which a process that closed its pipe may end by itself, and thus report how."""

STDERR_LINES = 20
"""The number of lines of the child's stderr that are kept. Native code prints the reason of an abort last."""

MAX_LINE = 2_000
"""The number of characters of a line that are kept."""

LAST_OUTPUT = 200
"""The number of characters of the last line that an error quotes."""


@dataclass(frozen=True)
class Ending:
    """The reason why a child is not used anymore."""

    kind: Literal["closed", "signal", "exit", "hang", "rubbish", "error"]
    detail: str = ""
    number: int = 0
    """The number of the signal, or the exit code."""
    loading: bool = False
    """True if the child ended before the package was loaded."""
    idle: bool = False
    """True if the child ended while it had nothing to do."""
    error: FastVLMError | None = None
    """The error of a package that does not open."""


class Reply:
    """The reply to one request, settled once by the listening thread.

    Attributes:
        outcome: a message or features, an error, or the ending of a child that ended.
        innocent: True if the child ended before it started with this request.
    """

    def __init__(self, number: int, slot: int | None = None) -> None:
        self.number, self.slot = number, slot
        self.outcome: dict[str, Any] | NDArray[Any] | FastVLMError | Ending | None = None
        self.innocent = False
        self.given = time.monotonic()
        self.predict_ms = 0.0
        self._arrived: SimpleQueue[None] = SimpleQueue()

    def settle(self, outcome: dict[str, Any] | NDArray[Any] | FastVLMError | Ending) -> None:
        """Sets the outcome and wakes the waiting thread."""
        self.outcome = outcome
        self._arrived.put(None)

    def wait(self, seconds: float) -> None:
        """Waits until the reply is settled, or for a time. A signal handler may raise out of it."""
        if self.outcome is None:
            with contextlib.suppress(Empty):
                self._arrived.get(timeout=seconds)


class ChildProcess:
    """A running child, with its guard and the thread that listens to it.

    Attributes:
        opening: the reply to the first request, which opens the package.
        memory: the shared pixels and features.
        free_slots: the slots of the memory that no image uses.
        ending: the reason why the child is not used anymore, None while it is in use.
        stage: the stage of loading, and its start by `time.monotonic`.

    Raises:
        MachineError: the child cannot be started.
    """

    def __init__(self, program: tuple[str, ...], layout: Layout, shapes: Shapes, opening: dict[str, Any]) -> None:
        self.opening = Reply(0)
        self.free_slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(SLOTS):
            self.free_slots.put(slot)
        self.ending: Ending | None = None
        self.stage: tuple[str, float] | None = None
        self._shapes = shapes
        self._waiting: dict[int, Reply] = {}
        self._progress = time.monotonic()
        self._stderr_lines: deque[str] = deque(maxlen=STDERR_LINES)
        self._writing, self._reaping = threading.Lock(), threading.Lock()
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
        self.request(self.opening, opening)

    def _start(self, program: tuple[str, ...], layout: Layout) -> None:
        with contextlib.ExitStack() as for_child:  # closes the descriptors that only the child needs

            def pipe() -> tuple[int, int]:
                return tuple(map(_above_stdio, os.pipe()))  # type: ignore[return-value]

            memory = _above_stdio(reserved_file(layout.total_bytes))
            for_child.callback(os.close, memory)
            self.memory = SharedMemory(layout, memory)
            lifeline, self._lifeline = pipe()
            for_child.callback(os.close, lifeline)
            requests, self._to_child = pipe()
            for_child.callback(os.close, requests)
            self._from_child, replies = pipe()
            for_child.callback(os.close, replies)
            self._stderr, stderr = pipe()
            for_child.callback(os.close, stderr)
            os.set_blocking(self._stderr, False)
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD],
                stdin=lifeline,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._child = subprocess.Popen(
                [sys.executable, "-P", *program, str(requests), str(replies), str(memory)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,  # output of native code must not reach the pipe of replies
                stderr=stderr,
                pass_fds=(requests, replies, memory),
                start_new_session=True,  # only this process handles the terminal's Ctrl-C
            )
            # Until the guard knows the child, the child only waits for a request, and ends when the pipe closes.
            os.write(self._lifeline, f"{self._child.pid}\n".encode())

    @property
    def pid(self) -> int | None:
        """The id of the process."""
        return self._child.pid if self._child else None

    @property
    def last_output(self) -> str:
        """The last line on the child's stderr with a letter or digit, empty if there is none."""
        lines = (" ".join(line.split()) for line in reversed(self._stderr_lines))
        return next((line[:LAST_OUTPUT] for line in lines if any(c.isalnum() for c in line)), "")

    @property
    def working_since(self) -> tuple[float, bool] | None:
        """The start of its current work by `time.monotonic`, and True if that is loading. None while it is idle."""
        first = next(iter(list(self._waiting.values())), None)
        return None if first is None else (max(first.given, self._progress), first.number == 0)

    def request(self, reply: Reply, content: dict[str, Any]) -> None:
        """Sends a request whose reply will be settled, also when the child ends."""
        with self._writing:
            self._waiting[reply.number] = reply
            sent = self.ending is None and self._to_child >= 0
            if sent:
                try:
                    send(self._to_child, content)
                except OSError:  # it has ended, and the listening thread finds out how
                    sent = False
            reply.innocent = not sent
        if self._finished:
            self._give_up()

    def fail(self, ending: Ending) -> None:
        """Kills the child. Its pending replies are settled with this ending."""
        self.ending = self.ending or ending
        self._kill()

    def end(self) -> None:
        """Kills the child, and waits until it has ended."""
        self.ending = self.ending or Ending("closed")
        self._reap(kill=True)

    def disown(self) -> None:
        """Leaves the child to the process that started it. To be called in a fork of that process."""
        self.ending = self.ending or Ending("closed")
        for process in (self._child, self._guard):
            if process is not None:
                process.returncode = 0  # keeps this fork from waiting for it
        self._writing, self._reaping = threading.Lock(), threading.Lock()
        self._close("_to_child", "_lifeline", "_from_child", "_stderr")
        self._child = self._guard = None

    def _listen(self) -> None:
        """Settles replies until the child's pipe closes. Runs in a thread of its own."""
        frames, poller = Frames(), select.poll()
        poller.register(self._from_child, select.POLLIN)
        poller.register(self._stderr, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poller.poll():
                    if descriptor == self._stderr:
                        if not self._read_stderr():
                            poller.unregister(descriptor)
                        continue
                    chunk = os.read(descriptor, MAX_BYTES)
                    if not chunk:
                        return
                    for message in frames.feed(chunk):
                        self._handle(message)
        except (FrameError, LookupError, TypeError, ValueError) as reason:
            self.fail(Ending("rubbish", str(reason), loading=self.opening.outcome is None))
        finally:
            self._finish()

    def _handle(self, message: dict[str, Any]) -> None:
        """Handles a message. Raises LookupError, TypeError or ValueError for an invalid one."""
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

    def _read_stderr(self) -> bool:
        """Reads the available output on stderr and keeps its end. Returns False when the pipe is closed."""
        try:
            chunk = os.read(self._stderr, MAX_BYTES)
        except BlockingIOError:
            return True
        unfinished = self._stderr_lines.pop() if self._stderr_lines else ""
        lines = (unfinished + chunk.decode(errors="replace")).split("\n")
        self._stderr_lines.extend(line[-MAX_LINE:] for line in lines)
        return bool(chunk)

    def _finish(self) -> None:
        """Finds out how a child that closed its pipe ended, and settles the pending replies with that."""
        blamed = next(iter(list(self._waiting.values())), None)
        if blamed is not None and blamed.innocent:
            blamed = None
        if self.ending is None or self.ending.kind == "error":
            self._reap(kill=False)
        if self.ending is None:
            code = self._child.returncode if self._child else None
            loading = self.opening.outcome is None
            if code is None:
                ending = Ending("rubbish", "it closed its pipe", loading=loading, idle=blamed is None)
            else:
                kind: Literal["signal", "exit"] = "signal" if code < 0 else "exit"
                ending = Ending(kind, number=abs(code), loading=loading, idle=blamed is None)
            self.ending = self.ending or ending
        self._reap(kill=True)
        with contextlib.suppress(OSError):
            self._read_stderr()
        self._close("_from_child", "_stderr")
        self._blamed, self._finished = blamed, True
        self._give_up()

    def _give_up(self) -> None:
        """Settles the pending replies with the ending. Only the first request can have caused it."""
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

    def _reap(self, kill: bool) -> None:
        """Waits for the child, after killing it with `kill`. The guard is ended first.

        Once the child has been waited for, its id may be another process's, which the guard must not kill.
        """
        with self._reaping:
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


os.register_at_fork(after_in_child=_disown_all)  # a fork must not keep the guard's pipe open


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
    """Returns the descriptor, or a duplicate above 2, because the child replaces stdio."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)
