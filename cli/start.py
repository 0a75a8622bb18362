"""The command's very beginning: Ctrl-C is understood before the imports that take a tenth of a second."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """`fastvlm`; see `cli.main.main`, which takes the signals over."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from .main import main as run

    run()


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Nothing has been begun, so nothing needs to be cleaned up."""
    sys.stderr.write("error: interrupted\n")
    sys.stderr.flush()
    os._exit(128 + signal_number)
