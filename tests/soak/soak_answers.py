"""Hundreds of answers from one model in two threads, with the same ids for the same seeds and flat memory.

python tests/soak/soak_answers.py --minutes 10 --answers 500
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

SEEDS = 10
WARM_ROUNDS = 3
"""The rounds after which caches are full and memory must stay flat."""
MAX_GROWTH_BYTES = 32 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--model", type=Path, help="an exported folder, instead of a new one of tiny")
    options = parser.parse_args()
    import fastvlm

    with tempfile.TemporaryDirectory(prefix="soak-answers-") as name:
        folder = options.model or Path(name) / "model"
        if options.model is None:
            fastvlm.export("tiny", folder)
        vlm = fastvlm.load(folder)
        faults = ask(vlm, options.answers, time.monotonic() + 60 * options.minutes)
    print(f"{len(faults)} faults", *faults, sep="\n")
    sys.exit(bool(faults))


def ask(vlm: object, answers: int, deadline: float) -> list[str]:
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    alone = {seed: answer(vlm, picture, seed) for seed in range(SEEDS)}
    asked, faults, memory = SEEDS, [], []
    while not memory or (asked < answers and time.monotonic() < deadline and not faults):
        pairs: list[dict[int, tuple[int, ...]]] = [{}, {}]
        threads = [threading.Thread(target=answer_all, args=(vlm, picture, found)) for found in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asked += 2 * SEEDS
        faults += [f"seed {seed}: {found.get(seed)} instead of {ids}" for found in pairs for seed, ids in alone.items()
                   if found.get(seed) != ids]  # fmt: skip
        memory.append(resident_bytes())
    warm = memory[min(WARM_ROUNDS, len(memory) - 1)]
    growth = memory[-1] - warm
    print(f"{asked} of {answers} answers, {len(set(alone.values()))} different ones")
    print(
        f"resident: {memory[0] / 1e6:.0f} MB at first, {warm / 1e6:.0f} MB warm, {memory[-1] / 1e6:.0f} MB at the end"
    )
    return [*faults, *([f"memory grew by {growth} bytes"] if growth > MAX_GROWTH_BYTES else [])]


def answer_all(vlm: object, picture: np.ndarray, found: dict[int, tuple[int, ...]]) -> None:
    for seed in range(SEEDS):
        found[seed] = answer(vlm, picture, seed)


def answer(vlm: object, picture: np.ndarray, seed: int) -> tuple[int, ...]:
    prompt = f"What is it? {'really ' * seed}"
    return vlm.generate(picture, prompt, max_tokens=12, temperature=1.0, seed=seed).token_ids  # type: ignore[attr-defined]


def resident_bytes() -> int:
    import os

    statm = Path("/proc/self/statm")
    if not statm.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a Mac: the peak, in bytes
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
