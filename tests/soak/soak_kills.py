"""Kills commands at random moments. Their outputs must be absent or complete, and other files unchanged.

    python tests/soak/soak_kills.py --minutes 15 --kills 100

Each command first runs to its end, to measure its time, and then gets SIGINT, SIGTERM or SIGKILL at seeded moments of
that time. After each kill the output is checked, and the command runs again to its end with the same output. Then two
of each run at once.
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
    """Yields the address of a hub in a separate process."""
    from fastvlm.models.references import TINY_FOLDER

    command = [sys.executable, str(HUB_SERVER), str(TINY_FOLDER), HUB_ID, str(BYTES_PER_SECOND)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


class Soak:
    """The commands, the outcomes of the kills, and the faults."""

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
            if job.removed_first or rng.random() < 0.5:
                remove(job.out)
            self.kill(job, rng.choice(SIGNALS), rng.random() * seconds[job.name])
            seconds[job.name] = self.alone(job)
            if n % 20 == 19:
                print(f"{n + 1} kills, {len(self.faults)} faults", flush=True)
        for job in self.jobs:
            self.two_at_once(job)

    def alone(self, job: Job) -> float:
        """Runs the command to its end and returns the seconds."""
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
        """Starts the job, sends the signal after `delay` seconds, and checks the output."""
        process = job.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        killed = process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        what = f"after {delay:.2f} s of {number.name}"
        state = "whole" if job.out.exists() else "absent"
        codes = {0, -number, 128 + number} if killed else {0}
        # A SIGINT during the start-up of Python itself
        by_python = process.returncode == -signal.SIGINT and errors.endswith("KeyboardInterrupt\n")
        if process.returncode not in codes or ("Traceback" in errors and not by_python):
            self.faults.append(f"{job.name} {what} ended with {process.returncode}: {errors[-600:]}")
        self.check(job, what)
        if number != signal.SIGKILL and not job.resumes and (left := job.leftovers(living(job))):
            self.faults.append(f"{job.name} {what} left {left}")
        self.tally[job.name, f"{number.name if process.returncode else 'finished before'}, {state}"] += 1

    def check(self, job: Job, what: str) -> None:
        """Checks that an existing output is complete and that other files are unchanged."""
        if job.out.exists():
            try:
                job.whole(job.out)
            except Exception as error:
                self.faults.append(f"{job.name} {what}: {job.out.name} is broken: {error!s:.300}")
        for path, content in self.others.items():
            if not path.is_file() or path.read_text() != content:
                self.faults.append(f"{job.name} {what}: {path} was touched")

    def two_at_once(self, job: Job) -> None:
        """Runs two processes with one new output. One must win, and the other must report it."""
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
    """Returns the work folder of a living process, which is this one."""
    return job.out.with_name(f".{job.out.name}.partial-{os.getpid()}")


def bystanders(folder: Path, jobs: list[Job]) -> dict[Path, str]:
    """Writes files of other programs, with names similar to work folders. Returns their contents."""
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
