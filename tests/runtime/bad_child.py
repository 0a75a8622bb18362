"""An encoder's process with one fault: `bad_child.py FAULT WHEN ONCE DESCRIPTORS...`.

FAULT is one of those below. WHEN is `load`, or the number of the image at which it happens. ONCE is a file that is made
when it happens and that protects the next process from it, or `-`. Otherwise features are the mean colours of patches,
so that answers can be checked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.runtime.encoder_child import main

FAULT, WHEN, ONCE = sys.argv[1:4]
REPLIES = int(sys.argv[5])


def hold_the_gil(seconds: int = 1000) -> None:
    """Holds the GIL as Core ML does while it compiles: signal handlers and other threads of Python do not run."""
    ctypes.PyDLL(None).sleep(seconds)


def crash(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


def abort() -> None:
    os.write(2, b"some noise\nMPSGraph: error: MLIR pass manager failed\n\n")
    crash(signal.SIGABRT)


FAULTS = {
    "segv": lambda: ctypes.string_at(8),
    "abort": abort,
    "kill": lambda: crash(signal.SIGKILL),
    "exit": lambda: os._exit(7),
    "hang": hold_the_gil,
    "rubbish": lambda: os.write(REPLIES, b"E5RT encountered an STL exception. msg = \x00\xff\n" * 3),
    "nonsense": lambda: os.write(REPLIES, b"\xf6vlm\0\0\0\x02[]"),
    "long": lambda: os.write(REPLIES, b"\xf6vlm\x7f\0\0\0"),
    "close": lambda: (os.close(REPLIES), hold_the_gil()),
    "print": lambda: (print("from Python", flush=True), os.write(1, b"from native code\n" * 10_000)),
    "none": lambda: None,
}
"""The faults. `print` is harmless."""


def go_wrong() -> None:
    if ONCE != "-":
        if Path(ONCE).exists():
            return
        Path(ONCE).touch()
    FAULTS[FAULT]()


class Encoder:
    name, image_size, projected, compile_ms = "bad", 128, False, 0.0

    def __init__(self, channels: int) -> None:
        self.count, self.channels = 0, channels

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        self.count += 1
        if str(self.count) == WHEN:
            go_wrong()
        if FAULT == "slow":
            time.sleep(float(WHEN))
        side = pixel_values.shape[2] // 64
        means = pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T[None]  # (1, side * side, 3)
        return np.pad(means, ((0, 0), (0, 0), (0, self.channels - 3)))


def opened(request: dict[str, Any], on_stage: Any) -> tuple[Encoder, dict[str, Any]]:
    on_stage("open")
    if WHEN == "load":
        go_wrong()
    return Encoder(request["shapes"][1]), {"open_ms": 1.0, "notes": ["slow here"]}


if __name__ == "__main__":
    main(opened, sys.argv[4:7])
