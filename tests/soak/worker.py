"""A process of the soak, which reads damaged files of one parser and reports the outcome of each."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

MAX_SECONDS = 10
"""The most processor time of a case, in seconds."""
MAX_CLOCK_SECONDS = 120
"""The most time of a case by the clock, in seconds, for a wait that never ends."""
MAX_GROWTH_BYTES = 2 * 2**30


def main() -> None:
    model, checkpoint, extra, folder, name, first, last = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fastvlm.models.errors import FastVLMError
    from soak.parsers import parsers

    parser = next(p for p in parsers(Path(model), Path(checkpoint), Path(extra)) if p.name == name)
    place = Path(folder)
    parser.prepare(place)
    parser.read(place)  # imports modules, and checks that the undamaged files are accepted
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MAX_GROWTH_BYTES + 2**29,) * 2)
    for seed in range(int(first), int(last)):
        damaged, base = parser.damage(place, seed), memory("VmRSS")
        report(seed=seed, outcome="began")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start = os.times()
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)  # the default action ends the process
        signal.setitimer(signal.ITIMER_REAL, MAX_CLOCK_SECONDS)
        try:
            parser.read(place)
            outcome, detail = "accepted", ""
        except FastVLMError as error:
            outcome, detail = "refused", f"{type(error).__name__}: {error!s:.200}"
        except BaseException as error:
            outcome, detail = "fault", f"{type(error).__name__}: {error!s:.300} {traceback.format_exc()[-600:]}"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = sum(os.times()[:2]) - sum(start[:2])
        growth = memory("VmHWM") - base
        if growth > MAX_GROWTH_BYTES:
            outcome, detail = "growth", f"{growth} bytes"
        elif seconds > MAX_SECONDS:
            outcome, detail = "hang", f"{seconds:.1f} s"
        report(seed=seed, outcome=outcome, detail=detail, seconds=seconds, growth=growth)
        parser.restore(place, damaged)


def memory(what: str) -> int:
    """Returns the resident bytes: the current ones (VmRSS) or the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{what}:"))


def report(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
