"""Helpers for tests that watch other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

BAD_CHILD = Path(__file__).with_name("bad_child.py")
"""An encoder's process that fails in the way that its arguments name."""


def is_running(pid: int) -> bool:
    """Returns True if a process exists and has not ended. One that nobody has waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Waits until a condition holds. Returns False if it does not within a time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
