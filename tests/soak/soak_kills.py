"""Kills commands at random moments: what they write is absent or whole, and nothing else is touched.

    python tests/soak/soak_kills.py --minutes 15 --kills 100

Each command is first left alone, to see how long it takes, then gets SIGINT, SIGTERM or SIGKILL at seeded moments of
that span. After each kill the output is looked at, and the command is run again, at the same place, to its end. Then
two of each are started at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from soak.kill_jobs import BYTES_PER_SECOND, HUB_ID, HUB_SERVER, Job, download_jobs, export_jobs, other_jobs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MAX_FAULTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="soak-kills-") as name, hub() as url:
        soak = Soak(Path(name), url, options.only)
        soak.run(options.kills, random.Random(options.seed), deadline)
    soak.report(options.kills)
    sys.exit(bool(soak.faults))


@contextlib.contextmanager
def hub() -> Iterator[str]:
    """The address of a hub that runs in a process of its own."""
    from fastvlm.models.references import TINY_FOLDER

    command = [sys.executable, str(HUB_SERVER), str(TINY_FOLDER), HUB_ID, str(BYTES_PER_SECOND)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


class Soak:
    """The commands, what became of each kill, and what was wrong."""

    def __init__(self, folder: Path, url: str, only: str) -> None:
        from fastvlm.export.exporter import export

        export("random:tiny", folder / "ready", image_size=128, allow_shortfall=True)
        made = [*export_jobs(folder), *download_jobs(folder, url), *other_jobs(folder, folder / "ready")]
        self.jobs = [job for job in made if only in job.name]
        self.others = bystanders(folder, self.jobs)
        self.tally: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    def run(self, kills: int, rng: random.Random, deadline: float) -> None:
        seconds = {job.name: self.alone(job) for job in self.jobs}
        print({name: round(span, 1) for name, span in seconds.items()}, flush=True)
        for n in range(kills):
            if time.monotonic() > deadline or len(self.faults) > MAX_FAULTS:
                break
            job = self.jobs[n % len(self.jobs)]
            if job.anew or rng.random() < 0.5:
                remove(job.out)
            self.kill(job, rng.choice(SIGNALS), rng.random() * seconds[job.name])
            seconds[job.name] = self.alone(job)
            if n % 20 == 19:
                print(f"{n + 1} kills, {len(self.faults)} faults", flush=True)
        for job in self.jobs:
            self.two_at_once(job)

    def alone(self, job: Job) -> float:
        """Runs it to its end; the seconds that it took."""
        start = time.monotonic()
        process = job.start()
        _, errors = process.communicate()
        seconds = time.monotonic() - start
        if process.returncode:
            self.faults.append(f"{job.name} cannot be run: {errors[-600:]}")
        elif not job.out.exists():
            self.faults.append(f"{job.name} wrote nothing")
        self.check(job, "left alone")
        if left := job.leftovers(living(job)):
            self.faults.append(f"{job.name} left {left}")
        return seconds

    def kill(self, job: Job, number: signal.Signals, delay: float) -> None:
        """Starts the job, sends the signal after `delay` seconds, and looks at what is there."""
        process = job.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        killed = process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        what = f"after {delay:.2f} s of {number.name}"
        state = "whole" if job.out.exists() else "absent"
        codes = {0, -number, 128 + number} if killed else {0}
        by_python = process.returncode == -signal.SIGINT and errors.endswith("KeyboardInterrupt\n")  # amid its start
        if process.returncode not in codes or ("Traceback" in errors and not by_python):
            self.faults.append(f"{job.name} {what} ended with {process.returncode}: {errors[-600:]}")
        self.check(job, what)
        if number != signal.SIGKILL and not job.resumes and (left := job.leftovers(living(job))):
            self.faults.append(f"{job.name} {what} left {left}")
        self.tally[job.name, f"{number.name if process.returncode else 'finished before'}, {state}"] += 1

    def check(self, job: Job, what: str) -> None:
        """What is there is whole, and other people's files are as they were."""
        if job.out.exists():
            try:
                job.whole(job.out)
            except Exception as error:
                self.faults.append(f"{job.name} {what}: {job.out.name} is broken: {error!s:.300}")
        for path, content in self.others.items():
            if not path.is_file() or path.read_text() != content:
                self.faults.append(f"{job.name} {what}: {path} was touched")

    def two_at_once(self, job: Job) -> None:
        """Two processes that write to one new place: one wins, the other says so."""
        if not job.loser:
            return
        place = job.out.with_name(f"contested-{job.out.name}")
        pair = [job.start(place) for _ in range(2)]
        ends = [(process.communicate()[1], process.returncode) for process in pair]
        lost = [errors.strip().splitlines()[-1] for errors, code in ends if code]
        print(f"two at once, {job.name}: {len(ends) - len(lost)} won; the other said: {lost}")
        if len(lost) != 1 or job.loser not in lost[0]:
            self.faults.append(f"two at once, {job.name}, ended as {ends}")
        job.whole(place)

    def report(self, wanted: int) -> None:
        for (name, outcome), count in sorted(self.tally.items()):
            print(f"{name:<18}{outcome:<34}{count:>5}")
        print(f"{self.tally.total()} of {wanted} kills, {len(self.faults)} faults", *self.faults, sep="\n")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def living(job: Job) -> Path:
    """The work folder of a process that lives: this one."""
    return job.out.with_name(f".{job.out.name}.partial-{os.getpid()}")


def bystanders(folder: Path, jobs: list[Job]) -> dict[Path, str]:
    """Other people's files, with names that come near those of ours."""
    files = {}
    for job in jobs:
        name = job.out.name
        for file in (f".{name}.partial-notes", f".{name}.partial-1.txt", f"{name}.txt", f".{name}.download.txt"):
            files[folder / file] = f"mine: {file}"
        files[living(job) / "file"] = "somebody is at it"
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return files


if __name__ == "__main__":
    main()
