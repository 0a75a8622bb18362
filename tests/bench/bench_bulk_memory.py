"""Prints the peak memory of bulk runs: `python tests/bench/bench_bulk_memory.py [--keys 10000 1000000]`.

The images are in tar shards, and the model is replaced by a fixed answer. Each run is a process of its own, and is then
resumed in another one, which reads the whole log and every header again.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SHARD = 10_000


def make_shard(path: Path) -> None:
    """Writes a tar archive of SHARD images of 8 x 8 pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    with tarfile.open(path, "w") as tar:
        for n in range(SHARD):
            member = tarfile.TarInfo(f"{n:05d}.png")
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))


def run(pattern: str, out: Path) -> None:
    """Runs a job and prints its images, its time and its peak memory in MB."""
    from fastvlm.runtime.bulk.job import Job
    from fastvlm.runtime.bulk.outputs import output_for
    from fastvlm.runtime.bulk.pipeline import Row
    from fastvlm.runtime.bulk.sources import Source

    class FixedRow(Row):
        @property
        def entry(self) -> dict:
            return {"text": "A picture of eight by eight pixels.", "tokens": 9, "finish_reason": "stop"}

    class Fixed:
        def rows(self, items: Iterator) -> Iterator[Row]:
            return (FixedRow(item.key, item.load()) for item in items)

    start = time.perf_counter()
    with Job(Source([pattern]), output_for(out), "run") as job:
        written = sum(1 for _ in job.captions(Fixed()))
        job.end()
    seconds = time.perf_counter() - start
    scale = 1e6 if sys.platform == "darwin" else 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    print(f"{written:>9,} written of {job.seen:>9,}   {seconds:6.1f} s   peak {peak:6.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run[0], Path(given.run[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        make_shard(Path(name) / "shard")
        for keys in given.keys:
            folder = Path(name) / str(keys)
            folder.mkdir()
            for n in range(keys // SHARD):
                (folder / f"{n:05d}.tar").hardlink_to(Path(name) / "shard")
            for _ in ("new", "resumed"):
                subprocess.run([sys.executable, __file__, "--run", f"{folder}/*.tar", f"{folder}/out.csv"], check=True)


if __name__ == "__main__":
    main()
