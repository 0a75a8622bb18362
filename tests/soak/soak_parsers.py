"""Damaged files for every parser. None may cause a traceback, a hang or growth.

    python tests/soak/soak_parsers.py --minutes 10 --cases 6000

Worker processes have limits of 10 s of processor time, 2 minutes by the clock, and 2 GB of growth. The script prints a
table, and exits with 1 on a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUND = 400
"""The cases of one parser at a time, so that every parser gets some before the time is up."""


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """The most processor time of a case, in seconds."""
    growth: int = 0
    seconds: float = 0.0
    """The time of all rounds by the clock, with the start of the workers."""
    next_seed: int = 0

    @property
    def cases(self) -> int:
        return self.outcomes.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--only", default="", help="parsers whose name contains this")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--model", type=Path, help="an exported folder, instead of a new one")
    parser.add_argument("--bench", type=Path, help="what `fastvlm bench --report` wrote, instead of a new one")
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("this soak reads memory from Linux's /proc: run it on Linux")
    sys.path.insert(0, str(HERE.parent))
    from soak.inputs import make_inputs
    from soak.parsers import parsers

    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        inputs = make_inputs(folder, options.model, options.bench)
        chosen = [p for p in parsers(*inputs) if options.only in p.name]
        tallies = {p.name: Tally(next_seed=options.first) for p in chosen}
        per_share = options.cases / sum(p.share for p in chosen)
        while time.monotonic() < deadline:
            waiting = [p for p in chosen if tallies[p.name].cases < round(per_share * p.share)]
            if not waiting:
                break
            for p in waiting:
                if time.monotonic() > deadline:
                    break
                left = round(per_share * p.share) - tallies[p.name].cases
                run_round(p.name, tallies[p.name], min(ROUND, left), inputs, folder, deadline)
        report(tallies, options.cases)
    sys.exit(any(tally.faults or not tally.cases for tally in tallies.values()))


def run_round(
    name: str, tally: Tally, count: int, inputs: tuple[Path, Path, Path], folder: Path, deadline: float
) -> None:
    """Runs `count` cases in a worker. A case that ends the worker is a fault. The rest waits for the next round."""
    place = folder / f"work-{name.replace(' ', '-')}-{tally.next_seed}"
    first, last = tally.next_seed, tally.next_seed + count
    command = [sys.executable, HERE / "worker.py", *inputs, place, name, first, last]
    errors, started = (folder / "stderr").open("w+"), time.monotonic()
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for one another take processor time too
    worker = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=alone)
    begun, late = None, False
    assert worker.stdout is not None
    for line in worker.stdout:
        entry = json.loads(line)
        begun = entry["seed"] if entry["outcome"] == "began" else None
        if begun is None:
            count_case(tally, entry)
        if time.monotonic() > deadline and begun is None:
            late = True
            worker.kill()
            break
    code = worker.wait()
    tally.seconds += time.monotonic() - started
    if begun is not None:
        kind = "hang" if -code in (signal.SIGVTALRM, signal.SIGALRM) else "crash"
        count_case(tally, {"seed": begun, "outcome": kind, "detail": f"exit code {code}"})
    elif code and not late:
        errors.seek(0)
        raise SystemExit(f"the worker of {name} failed before its first case: {errors.read()[-2000:]}")
    errors.close()
    print(f"{name}: {tally.cases} cases, {len(tally.faults)} faults", *tally.faults, sep="\n  ", flush=True)


def count_case(tally: Tally, entry: dict) -> None:
    tally.next_seed = entry["seed"] + 1
    tally.outcomes[entry["outcome"]] += 1
    tally.slowest = max(tally.slowest, entry.get("seconds", 0))
    tally.growth = max(tally.growth, entry.get("growth", 0))
    if entry["outcome"] not in ("accepted", "refused"):
        tally.faults.append(f"seed {entry['seed']}: {entry['outcome']} {entry.get('detail', '')}")


def report(tallies: dict[str, Tally], wanted: int) -> None:
    titles = f"{'cases':>7}{'accepted':>10}{'refused':>9}{'faults':>8}{'slowest':>10}{'growth':>10}{'took':>9}"
    print(f"{'parser':<24}{titles}")
    for name, tally in tallies.items():
        counts = f"{tally.cases:>7}{tally.outcomes['accepted']:>10}{tally.outcomes['refused']:>9}{len(tally.faults):>8}"
        print(f"{name:<24}{counts}{tally.slowest:>8.1f} s{tally.growth / 1e6:>7.0f} MB{tally.seconds:>7.0f} s")
    cases, seconds = (sum(getattr(tally, what) for tally in tallies.values()) for what in ("cases", "seconds"))
    print(f"{cases} of {wanted} cases, {cases / max(seconds, 1):.1f} in a second")
    for name, tally in tallies.items():
        for fault in tally.faults:
            print(f"{name}, {fault}")


if __name__ == "__main__":
    main()
