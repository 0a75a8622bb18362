"""Kills bulk runs at random moments: `python tests/soak/soak_captions.py [--kills 50] [--images 2000]`.

Every run resumes the last one, and the last run is left to end. Then each key must be in the output once, with its own
image. The model is replaced by a digest of each image, so that the kills hit the files. The last row fills a disk: a
limit on the size of files ends every write, first early and then later.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

KINDS = {"jsonl": "out.jsonl", "csv": "out.csv", "parquet": "out.parquet", "txt": "texts", "xmp": "texts",
         "webdataset": "shards", "tar": "out.tar"}  # fmt: skip
ROW_SECONDS = 0.0005
"""The time of a row, so that kills find runs that are not complete."""
BROKEN_EVERY = 50
"""One of so many images is broken, so that it gets a row with an error."""


def name_of(n: int) -> str:
    return f"{n % 7}/{n:05d}.ppm"


def make_images(folder: Path, count: int) -> None:
    """Writes tiny images, all different."""
    for n in range(count):
        path = folder / name_of(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if n % BROKEN_EVERY == 1 else b"P6 1 1 255\n" + n.to_bytes(3, "big"))


def run(images: Path, out: Path, kind: str) -> None:
    """Runs a job without a model. This is what the killed process does."""
    from fastvlm.runtime.bulk import outputs
    from fastvlm.runtime.bulk.job import Job
    from fastvlm.runtime.bulk.outputs import output_for
    from fastvlm.runtime.bulk.pipeline import Row
    from fastvlm.runtime.bulk.sources import Source

    outputs.SHARD_SAMPLES = 300

    class DigestRow(Row):
        @property
        def entry(self) -> dict:
            content = self.image.read_bytes()
            if content == b"broken":
                return {"error": "broken"}
            return {"text": hashlib.sha256(content).hexdigest(), "tokens": 1, "finish_reason": "stop"}

    class Digests:
        def rows(self, items: Iterator) -> Iterator[Row]:
            for item in items:
                time.sleep(ROW_SECONDS)
                yield DigestRow(item.key, item.load())

    with Job(Source([images]), output_for(out, None if kind == "tar" else kind), "run") as job:
        list(job.captions(Digests()))
        job.end()


def killed_at_random(command: list[str], log: Path, rng: random.Random, share: int) -> bool:
    """Starts a run and kills it after up to `share` new lines. Returns False if it ended before."""
    before = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    goal = before + rng.randrange(100 * share)
    while process.poll() is None and (not log.exists() or log.stat().st_size <= goal):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def found(out: Path, kind: str) -> list[tuple[str, str]]:
    """Returns the key and text of every caption in an output."""
    if kind == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    elif kind == "csv":
        rows = list(csv.DictReader(out.open(newline="")))
    elif kind == "parquet":
        from pyarrow import parquet

        rows = parquet.read_table(out).to_pylist()
    elif kind in ("txt", "xmp"):
        files = [(path, path.read_text()) for path in out.rglob(f"*.{kind}")]
        rows = [{"file": str(path.relative_to(out).with_suffix("")), "text": text} for path, text in files]
        for row in rows:
            row["file"] = row["file"].removesuffix(".ppm") + ".ppm"
            row["text"] = row["text"].strip() if kind == "txt" else row["text"].split('default">')[1][:64]
    else:
        rows = []
        for shard in [out] if kind == "tar" else sorted(out.glob("*.tar")):
            with tarfile.open(shard) as tar:
                members = [(member.name, tar.extractfile(member).read()) for member in tar]
            for (_, image), _, (_, described) in zip(members[::3], members[1::3], members[2::3], strict=True):
                row = json.loads(described)
                assert row["text"] == hashlib.sha256(image).hexdigest()
                rows.append(row)
    return [(row["file"], row["text"]) for row in rows if not row.get("error")]


def check(images: Path, out: Path, log: Path, kind: str, count: int) -> None:
    """Checks that each key has one line, and each whole image its own caption, once."""
    keys = Counter(json.loads(line)["file"] for line in log.read_text().splitlines())
    assert keys == Counter({name_of(n): 1 for n in range(count)}), keys.most_common(3)
    good = [name_of(n) for n in range(count) if n % BROKEN_EVERY != 1]
    expected = {name: hashlib.sha256((images / name).read_bytes()).hexdigest() for name in good}
    captions = found(out, kind)
    assert len(captions) == len(good), (len(captions), len(good))
    assert dict(captions) == expected
    assert not [path for path in out.parent.rglob("*.partial") if path.name.startswith(".")], "a partial file is left"


def soak(kind: str, folder: Path, kills: int, count: int, rng: random.Random) -> int:
    """Kills runs into one output, lets the last end, and returns the number of kills."""
    from fastvlm.runtime.bulk.outputs import output_for

    images, out = folder / "images", folder / kind / KINDS[kind]
    out.parent.mkdir()
    log = output_for(out, None if kind == "tar" else kind).log_path
    command = [sys.executable, __file__, "--run", str(images), str(out), kind]
    killed = sum(killed_at_random(command, log, rng, max(1, count // kills)) for _ in range(kills))
    subprocess.run(command, check=True)
    check(images, out, log, kind, count)
    return killed


def full_disk(kind: str, folder: Path, count: int) -> int:
    """Runs under growing limits on the size of a file, as on a disk that is full, and returns the failed runs."""
    images, out = folder / "images", folder / f"{kind}-full" / KINDS[kind]
    out.parent.mkdir()
    command = [sys.executable, __file__, "--run", str(images), str(out), kind]
    failed = 0
    for limit in (1000, 5000, 30_001, 30_777, 100_000):

        def limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True)
        assert done.returncode == 0 or "cannot be written: File too large" in done.stderr, done.stderr
        failed += done.returncode != 0
    subprocess.run(command, check=True)
    from fastvlm.runtime.bulk.outputs import output_for

    check(images, out, output_for(out, None if kind == "tar" else kind).log_path, kind, count)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(Path(given.run[0]), Path(given.run[1]), given.run[2])
        return
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name) / "images", given.images)
        for kind in given.kinds:
            killed = soak(kind, Path(name), given.kills, given.images, random.Random(given.seed))
            failed = full_disk(kind, Path(name), given.images)
            print(f"{kind:<11} {killed} of {given.kills} runs killed, {failed} of 5 with a full disk: every key once")


if __name__ == "__main__":
    main()
