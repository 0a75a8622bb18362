"""Prints the gain of a second actor: `python tests/bench/bench_ray.py FOLDER [--images 200] [--runs 3]`.

A local Ray cluster has one pool of one actor and one of two, each of one core. All actors are warm. The pools alternate
on images that neither has seen, and their rows must be identical. The last line is this process alone, with one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before the import of MLX and torch, for this process

import numpy as np
from PIL import Image

import fastvlm
from fastvlm.runtime.bulk.pipeline import Captioner
from fastvlm.runtime.bulk.ray_pool import RayCaptioner, connect
from fastvlm.runtime.bulk.sources import Source

PROMPT = "Describe the image."
SIDE = 256


def make_images(folder: Path, count: int, seed: int) -> None:
    """Writes PNGs of smooth colors."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{n:04d}.png")


def timed(captioner: Any, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Returns the images per second of a captioner, and its rows without their times."""
    start = time.perf_counter()
    rows = list(captioner.rows(Source([folder])))
    rate = len(rows) / (time.perf_counter() - start)
    assert not any(row.error for row in rows)
    return rate, [{"file": row.key, **{k: v for k, v in row.entry.items() if k != "timings"}} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    options = {"max_tokens": given.tokens, "ignore_eos": True}
    connect("local", actors=3, actor_cpus=1)
    with (
        tempfile.TemporaryDirectory() as name,
        RayCaptioner(given.folder, [PROMPT], options, actors=1) as one,
        RayCaptioner(given.folder, [PROMPT], options, actors=2) as two,
    ):
        alone = Captioner(fastvlm.load(given.folder), PROMPT, options, workers=1)
        captioners = {"1 actor": one, "2 actors": two, "this process": alone}
        rates: dict[str, list[float]] = {title: [] for title in captioners}
        for run in range(given.runs + 1):
            folder = Path(name) / str(run)
            make_images(folder, given.images if run else 64, run)
            found = {title: timed(captioner, folder) for title, captioner in captioners.items()}
            assert all(rows == found["1 actor"][1] for _, rows in found.values()), "the rows differ"
            for title, (rate, _) in found.items():
                if run:  # the first run warms up
                    rates[title].append(rate)
    print(f"{given.images} images of {SIDE} px, {given.tokens} tokens, median of {given.runs}, identical rows")
    for title, values in rates.items():
        gains = [value / base for value, base in zip(values, rates["1 actor"], strict=True)]
        print(
            f"  {title:<14} {statistics.median(values):7.2f} images/s   {statistics.median(gains):.2f} x 1 actor"
            f"   (runs: {' '.join(f'{gain:.2f}' for gain in gains)})"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
