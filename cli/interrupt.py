"""Ctrl-C as an exception that no handler catches by accident, and that survives where Python drops exceptions."""

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
RETRY_SECONDS = 0.01
"""The delay in seconds before a signal is raised again: short for a user, and long enough for an import."""

_asked: int | None = None
_retry_is_due = False


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: unwinds everything, so that partial output is removed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Handles a signal by raising `Interrupted`, later if an extension is being loaded: that would abort."""
    global _asked
    _asked = signal_number
    if _loads_extension(frame):
        _retry_later(signal_number)
        return
    raise Interrupted(signal_number)


def asked_to_stop() -> int | None:
    """Returns the signal that was received, even if other code replaced `Interrupted` by another exception."""
    return _asked


def resumed() -> None:
    """Marks a Ctrl-C as handled: it stopped an answer, and the command continues."""
    global _asked
    _asked = None


def listen() -> None:
    """Makes signals raise `Interrupted`.

    In a finalizer, whose exceptions Python drops, and during the import of an extension they raise a moment later.
    """
    for number in SIGNALS:
        signal.signal(number, interrupt)
    sys.unraisablehook = _retry


def stop_listening() -> None:
    """Ends the handling of signals. From here on one exits at once, without interrupting finalizers."""
    sys.unraisablehook = sys.__unraisablehook__
    if _retry_is_due:
        signal.setitimer(signal.ITIMER_REAL, 0)
    atexit.register(_handle, signal.SIG_IGN)  # Python joins its threads before it calls this
    _handle(_leave)


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Handles a signal by exiting. Printed text is flushed, and an interruption is reported once."""
    try:
        if _asked is None:
            sys.stderr.write("error: interrupted\n")
        sys.stdout.flush()
    finally:
        os._exit(128 + signal_number)


def _retry(dropped: sys.UnraisableHookArgs) -> None:
    if not isinstance(dropped.exc_value, Interrupted):
        sys.__unraisablehook__(dropped)
        return
    _retry_later(dropped.exc_value.signal_number)


def _retry_later(signal_number: int) -> None:
    global _retry_is_due
    _retry_is_due = True
    signal.signal(signal.SIGALRM, lambda _, frame: interrupt(signal_number, frame))
    signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)


def _loads_extension(frame: FrameType | None) -> bool:
    """Returns whether an extension is being loaded: MLX's C++ calls Python then, and an exception would abort it."""
    while frame is not None:
        loading = frame.f_code.co_name in ("create_module", "exec_module")
        if loading and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False
