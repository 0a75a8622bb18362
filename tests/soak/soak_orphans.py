"""Kills programs with an encoder in a separate process at random moments. No process or file may remain.

python tests/soak/soak_orphans.py --kills 50
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = Path(__file__).resolve().parents[1] / "runtime" / "bad_child.py"

PARENT = """
import sys
from pathlib import Path
import numpy as np
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import Shapes
child, fault, when, marker = sys.argv[1:]
pixels = np.zeros((1, 3, 128, 128), np.float32)
while True:
    with EncoderProcess(Path("x"), Shapes(128, 3, 6), program=(child, fault, when, marker)) as encoder:
        print("begun", flush=True)
        for _ in range(20):
            encoder.submit(pixels)
            encoder.encode(pixels)
"""
"""A program that starts, uses and ends encoders without a pause, so that kills hit every moment."""

MARK = "FASTVLM_SOAK_MARK"


def marked(mark: str) -> list[int]:
    """Returns the living processes that have inherited the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            inherited = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if inherited and state != "Z":
            found.append(int(folder.name))
    return found


def left_files(scratch: str) -> set[str]:
    """Returns the files in shared memory, and all in the programs' own folder of temporary files."""
    return {str(path) for path in (*Path("/dev/shm").glob("*fastvlm*"), *Path(scratch).iterdir())}


def kill_once(number: int, rng: random.Random, scratch: str) -> tuple[list[int], float]:
    """Kills one program with SIGKILL. Returns the remaining processes, and the seconds until the last one ended."""
    mark = f"{os.getpid()}-{number}"
    fault, when = rng.choice([("none", "never"), ("hang", "load"), ("hang", "1"), ("slow", "0.01"), ("hang", "7")])
    command = [sys.executable, "-c", PARENT, str(CHILD), fault, when, "-"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, MARK: mark, "TMPDIR": scratch})
    assert parent.stdout is not None
    if rng.random() < 0.8:
        parent.stdout.readline()
    time.sleep(rng.random() * 3.0)  # loading takes about one
    parent.kill()
    parent.wait()
    parent.stdout.close()
    start = time.monotonic()
    while (left := marked(mark)) and time.monotonic() - start < 2.0:
        time.sleep(0.005)
    return left, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, orphans, longest = random.Random(given.seed), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        before = left_files(scratch)
        for number in range(given.kills):
            left, seconds = kill_once(number, rng, scratch)
            orphans, longest = orphans + len(left), max(longest, seconds)
            for pid in left:
                os.kill(pid, 9)
        files = left_files(scratch) - before
    print(f"{given.kills} kills, {orphans} orphans, {len(files)} files, the slowest gone after {1000 * longest:.0f} ms")
    sys.exit(bool(orphans or files))


if __name__ == "__main__":
    main()
