"""Whether a process survives the seconds after an answer, in which Core ML lets go of the encoder's input.

    python tests/mac/after_answer.py FOLDER [--seconds 3] [--backend reference]

coremltools 9.0 may end a process about one second after an image: Core ML releases the input array on a queue of its
own, and coremltools drops the reference without the GIL. Allocations in that second make the damage visible. Answers
about three images, each followed by such a wait, then prints one JSON object. A crash shows as the exit code of this
process, or as an encoder process that is another one than before.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

import fastvlm

PICTURES = 3
HELD = 512
"""Objects that are alive at a time while waiting: enough to take the place of what was freed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="to wait after each answer")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--compute-units", default=None)
    arguments = parser.parse_args()
    model = fastvlm.load(
        arguments.folder, arguments.backend, compute_units=arguments.compute_units, encoder_process=True
    )
    processes, allocations = [], 0
    for number in range(PICTURES):
        model.generate(picture(number), "Describe the image.", max_tokens=4)
        processes.append(encoder_process(model))
        allocations += allocate(arguments.seconds)
    if encoder_process(model) != processes[0] or len(set(processes)) != 1:
        raise SystemExit(f"the encoder process ended while nothing was asked of it: {processes}")
    result = {
        "python": platform.python_version(),
        "vision": model.engine.encoder.name,
        "answers": PICTURES,
        "seconds_after_each": arguments.seconds,
        "allocations": allocations,
        "own_process": processes[0] is not None,
    }
    print(json.dumps(result))


def encoder_process(model: fastvlm.FastVLM) -> int | None:
    """The process id of the encoder; None where it runs in this process."""
    return getattr(model.engine.encoder, "pid", None)


def picture(number: int) -> np.ndarray:
    """(96, 96, 3) uint8: another one for each number, so that none is taken from a cache."""
    return np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8)


def allocate(seconds: float) -> int:
    """Makes and drops objects of many sizes for so long, and returns how many."""
    held: list[Any] = [None] * HELD
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for size in (1, 7, 40, 300, 2000):
            held[count % HELD] = [np.zeros(size, np.float32), bytearray(size), {size: str(count)}]
            count += 1
        if count % 10_000 == 0:
            gc.collect()
    return count


if __name__ == "__main__":
    main()
