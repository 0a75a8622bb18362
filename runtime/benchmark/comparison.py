"""The comparison of two benchmarks, with a verdict for each stage.

`fastvlm bench --compare` adds to its JSON, as `comparison`:

    old             start of the earlier benchmark
    warnings        differences of the machine and the workload
    unmatched       labels of configurations that are in only one of the two
    configurations  label -> measure -> old and new median, low and high (95 % interval of new / old), p, ratio,
                    verdict, where measures are the stages, ttft_ms and ms_per_token (of decoding)

Runs of one process are more alike than runs of two, as memory layout, clocks and neighbours differ. A test that takes
all runs as independent would report every second repetition of an unchanged program as a difference. So two tests have
to agree here, and a change below 1 % is never reported:

- the 95 % interval of the ratio excludes 1. It is computed from the logarithms of the processes' medians (Student 1908,
  pooled variance).
- the ranks of all runs (Mann and Whitney 1947, two-sided) are unlikely without a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..evaluation.scoring import Z95
from ..timings import TTFT_STAGES
from .report import MS_PER_TOKEN, TTFT, Benchmark, Configuration

COMPARED = (*TTFT_STAGES, TTFT, MS_PER_TOKEN)
"""The measures that are compared."""

ENVIRONMENT = ("chip", "cores", "memory_bytes", "os", "python", "fastvlm", "mlx", "torch", "coremltools", "numpy",
               "blas", "threads", "power")  # fmt: skip
"""The facts that should be equal. The load average is left out, as it shows in the noise."""

Verdict = Literal["faster", "slower", "no difference seen", "too few runs"]

LEVEL = 0.01
"""The significance level of the rank test. It is strict because several stages are tested together."""

FLOOR = 0.01
"""The smallest change, as a share, that is reported. Clocks and schedulers do not repeat better."""

MIN_PROCESSES = 2
"""The fewest processes per side. One process does not show how much the next would differ."""

MIN_RUNS = 5
"""The fewest runs per side. Among fewer, no ranks are unlikely enough for `LEVEL`."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""The 97.5 % quantiles of Student's distribution for 1 to 8 degrees of freedom."""

MAX_EXACT = 2000
"""The number of pairs of runs up to which the rank test is exact."""


@dataclass(frozen=True)
class TimeChange:
    """The change between two sets of times."""

    old: float
    new: float
    """The medians of all runs."""
    low: float | None
    high: float | None
    """The 95 % interval of new / old, or None with too few processes."""
    p: float
    """The p-value of the rank test."""
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """The new median as a multiple of the old one."""
        return self.new / self.old

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields and `ratio`."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Comparison:
    """A benchmark compared with an earlier one."""

    old_created: str
    changes: dict[str, dict[str, TimeChange]]
    """The changes by label and measure."""
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def slowdown(self) -> float:
        """The largest share by which a TTFT is slower beyond noise (0.2 is 20 %), or 0."""
        worse = [found[TTFT].ratio - 1 for found in self.changes.values()
                 if TTFT in found and found[TTFT].verdict == "slower"]  # fmt: skip
        return max(worse, default=0.0)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """The reasons why rows have no verdict on their TTFT. Empty if every row of both sides has one."""
        alone = [f"{label} is in only one of the two reports" for label in self.unmatched]
        few = [
            f"{label} has too few runs (at least two processes and five runs of each side are needed)"
            for label, found in self.changes.items()
            if TTFT not in found or found[TTFT].verdict == "too few runs"
        ]
        return (*alone, *few)

    def as_dict(self) -> dict[str, Any]:
        """Returns the object described at the top of this file."""
        return {
            "old": self.old_created,
            "warnings": list(self.warnings),
            "unmatched": list(self.unmatched),
            "configurations": {
                label: {measure: one.as_dict() for measure, one in found.items()}
                for label, found in self.changes.items()
            },
        }


def compare(new: Benchmark, old: Benchmark) -> Comparison:
    """Compares configurations with equal labels, or the only configuration of each side."""
    pairs = list(_pairs(new, old))
    matched = {id(one) for pair in pairs for one in pair}
    unmatched = tuple(one.label for side in (new, old) for one in side.configurations if id(one) not in matched)
    return Comparison(
        old_created=old.created,
        changes={after.label: changes(before, after) for before, after in pairs},
        unmatched=unmatched,
        warnings=(*_benchmark_warnings(old, new), *(text for pair in pairs for text in _pair_warnings(*pair))),
    )


def changes(old: Configuration, new: Configuration) -> dict[str, TimeChange]:
    """Returns the changes by measure, for measures that both sides have."""
    found = {name: change(_times(old, name), _times(new, name)) for name in COMPARED}
    return {name: one for name, one in found.items() if one}


def _times(one: Configuration, measure: str) -> list[list[float]]:
    """Returns milliseconds by process."""
    times = [[getattr(run, measure) for run in process.runs] for process in one.processes]
    return [[time for time in found if time is not None] for found in times]


def _pairs(new: Benchmark, old: Benchmark) -> Iterator[tuple[Configuration, Configuration]]:
    """Yields (old, new)."""
    if len(new.configurations) == len(old.configurations) == 1:
        yield old.configurations[0], new.configurations[0]
        return
    earlier = {one.label: one for one in old.configurations}
    yield from ((earlier[one.label], one) for one in new.configurations if one.label in earlier)


def _benchmark_warnings(old: Benchmark, new: Benchmark) -> Iterator[str]:
    for name in ENVIRONMENT:
        yield from _difference(name, old.environment.get(name), new.environment.get(name))
    for name in ("prompt", "max_tokens"):
        yield from _difference(name, old.workload.get(name), new.workload.get(name))
    pictures = [side.workload.get("image") for side in (old, new)]
    hashes = [image.get("sha256") if isinstance(image, dict) else None for image in pictures]
    if hashes[0] != hashes[1]:
        yield "the image is a different one"


def _pair_warnings(old: Configuration, new: Configuration) -> Iterator[str]:
    """Yields differences between two configurations that should be equal."""
    where = f"{new.label}: "
    for name in ("vision", "compute_units", "kv_bits", "decoder", "image_size", "prompt_tokens", "reused_tokens"):
        yield from _difference(where + name, getattr(old, name), getattr(new, name))
    for name in ("encoder", "decoder"):
        yield from _difference(f"{where}bytes of the {name}", old.sizes_bytes[name], new.sizes_bytes[name])
    sources = [one.folder.get("source") for one in (old, new)]
    if sources[0] != sources[1]:
        yield f"{where}the folder comes from a different checkpoint"


def _difference(name: str, old: object, new: object) -> Iterator[str]:
    if old != new:
        yield f"{name} was {old}, is {new}"


def change(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> TimeChange | None:
    """Returns the change of times by process, or None if a side has no times above 0."""
    sides = [[np.asarray(one, np.float64) for one in side if len(one)] for side in (old, new)]
    if not all(sides) or not all(np.median(one) > 0 for side in sides for one in side):
        return None
    before, after = (np.concatenate(side) for side in sides)
    interval, p = ratio_interval(*sides), mann_whitney(before, after)
    low, high = interval or (None, None)
    medians = float(np.median(before)), float(np.median(after))
    judged = interval if enough(len(before), len(after)) else None
    return TimeChange(*medians, low, high, p, verdict(medians[1] / medians[0], judged, p))


def enough(old: int, new: int) -> bool:
    """Returns True if the numbers of runs suffice for a verdict."""
    return min(old, new) >= MIN_RUNS


def verdict(ratio: float, interval: tuple[float, float] | None, p: float) -> Verdict:
    """Returns the verdict on which both tests and the smallest change agree."""
    if interval is None:
        return "too few runs"
    if interval[0] <= 1 <= interval[1] or p > LEVEL or abs(math.log(ratio)) < FLOOR:
        return "no difference seen"
    return "faster" if ratio < 1 else "slower"


def ratio_interval(
    old: Sequence[NDArray[np.float64]], new: Sequence[NDArray[np.float64]]
) -> tuple[float, float] | None:
    """Returns the 95 % interval of new / old from the processes' medians, or None with fewer than two per side."""
    sides = [np.log([np.median(one) for one in side]) for side in (old, new)]
    if min(map(len, sides)) < MIN_PROCESSES:
        return None
    freedom = sum(map(len, sides)) - 2
    variance = sum(((side - side.mean()) ** 2).sum() for side in sides) / freedom
    half = student(freedom) * math.sqrt(variance * sum(1 / len(side) for side in sides))
    difference = sides[1].mean() - sides[0].mean()
    return math.exp(difference - half), math.exp(difference + half)


def student(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's distribution, to 0.2 %.

    Beyond the table it uses the expansion by Cornish and Fisher.
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mann_whitney(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """Returns the two-sided p-value of the ranks, exact for few runs without ties, else approximated."""
    less = (new[:, None] < old[None, :]).sum() + 0.5 * (new[:, None] == old[None, :]).sum()
    n, m = len(old), len(new)
    values, counts = np.unique(np.concatenate([old, new]), return_counts=True)
    if len(values) == n + m and n * m <= MAX_EXACT:
        ways = arrangements(n, m)
        tail = int(min(less, n * m - less))
        return min(1.0, 2 * sum(ways[: tail + 1]) / sum(ways))
    total = n + m
    ties = (counts**3 - counts).sum() / (total * (total - 1))
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties))
    if deviation == 0:
        return 1.0
    z = (abs(less - n * m / 2) - 0.5) / deviation
    return min(1.0, math.erfc(max(z, 0.0) / math.sqrt(2)))


def arrangements(n: int, m: int) -> list[int]:
    """Returns the number of orders of n and m runs with u inverted pairs, for u from 0 to n * m.

    The numbers are the coefficients of a Gaussian binomial.
    """
    counts = [1]
    for k in range(1, m + 1):  # times (1 - x^(n+k)) / (1 - x^k)
        counts = counts + [0] * n
        for u in range(len(counts) - 1, n + k - 1, -1):
            counts[u] -= counts[u - n - k]
        for u in range(k, len(counts)):
            counts[u] += counts[u - k]
    return counts
