"""Ctrl-C, as an exception that nothing catches by accident, and that is not lost where Python loses exceptions."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 0.01

_asked: int | None = None
_again_is_due = False


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: unwinds everything, so that partial output is removed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """A signal handler. Raises `Interrupted`, but amid the making of an extension module, which would abort."""
    global _asked
    _asked = signal_number
    if _makes_extension(frame):
        _come_again(signal_number)
        return
    raise Interrupted(signal_number)


def asked_to_stop() -> int | None:
    """The signal that has come, also where other code made another exception of `Interrupted`."""
    return _asked


def gone_on() -> None:
    """Ctrl-C has ended what it was meant to end, and not the command."""
    global _asked
    _asked = None


def listen() -> None:
    """Signals raise `Interrupted` from here on.

    They do so a moment later in a finalizer, whose exceptions Python drops, and amid the import of an extension.
    """
    for number in SIGNALS:
        signal.signal(number, interrupt)
    sys.unraisablehook = _again


def stop_listening() -> None:
    """The work is done: a signal ends the process while it waits for threads, and leaves its finalizers in peace."""
    sys.unraisablehook = sys.__unraisablehook__
    if _again_is_due:
        signal.setitimer(signal.ITIMER_REAL, 0)
    atexit.register(_handle, signal.SIG_IGN)  # Python joins its threads before it calls what is registered
    _handle(_leave)


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler. What was printed is kept; an interruption that was told already is not told again."""
    try:
        if _asked is None:
            sys.stderr.write("error: interrupted\n")
        sys.stdout.flush()
    finally:
        os._exit(128 + signal_number)


def _again(dropped: sys.UnraisableHookArgs) -> None:
    if not isinstance(dropped.exc_value, Interrupted):
        sys.__unraisablehook__(dropped)
        return
    _come_again(dropped.exc_value.signal_number)


def _come_again(signal_number: int) -> None:
    global _again_is_due
    _again_is_due = True
    signal.signal(signal.SIGALRM, lambda _, frame: interrupt(signal_number, frame))
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def _makes_extension(frame: FrameType | None) -> bool:
    """C++ that calls Python while a module is made (MLX's does) knows no exceptions there."""
    while frame is not None:
        making = frame.f_code.co_name in ("create_module", "exec_module")
        if making and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
