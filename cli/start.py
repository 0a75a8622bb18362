"""The entry point: it handles Ctrl-C before the imports, which take a tenth of a second."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """Runs `fastvlm`. `cli.main.main` takes over the signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from .main import main as run

    run()


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Handles a signal. Nothing has been written yet, so nothing needs cleaning up."""
    sys.stderr.write("error: interrupted\n")
    sys.stderr.flush()
    os._exit(128 + signal_number)
