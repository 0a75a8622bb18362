"""Two benchmarks next to each other, with a verdict for each stage.

`fastvlm bench --compare` adds to its JSON, as `comparison`:

    old             when the earlier benchmark began
    warnings        what was different besides what is to be compared
    unmatched       labels of configurations that stand in only one of the two
    configurations  label -> measure -> old and new median, low and high (95 % interval of new / old), p, ratio,
                    verdict; measures are the stages, ttft_ms and ms_per_token (of decoding)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..timings import TTFT_STAGES
from .noise import Change, change
from .report import MS_PER_TOKEN, TTFT, Benchmark, Configuration

COMPARED = (*TTFT_STAGES, TTFT, MS_PER_TOKEN)

ENVIRONMENT = ("chip", "cores", "memory_bytes", "os", "python", "fastvlm", "mlx", "torch", "coremltools", "numpy",
               "blas", "threads", "power")  # fmt: skip
"""What should be the same; the load is not, and shows in the noise."""


@dataclass(frozen=True)
class Comparison:
    old_created: str
    changes: dict[str, dict[str, Change]]
    """By label and measure."""
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def slowdown(self) -> float:
        """The largest share by which TTFT is slower beyond noise: 0.2 is 20 %; 0 when none is."""
        worse = [found[TTFT].ratio - 1 for found in self.changes.values()
                 if TTFT in found and found[TTFT].verdict == "slower"]  # fmt: skip
        return max(worse, default=0.0)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Why a row has no verdict on its TTFT, in words; empty when every row of both sides has one."""
        alone = [f"{label} is in only one of the two reports" for label in self.unmatched]
        few = [
            f"{label} has too few runs (two processes and five runs of each side are the least that can be judged)"
            for label, found in self.changes.items()
            if TTFT not in found or found[TTFT].verdict == "too few runs"
        ]
        return (*alone, *few)

    def as_dict(self) -> dict[str, Any]:
        """See the head of this file."""
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
    """Configurations are matched by their labels; where each side has one only, these two."""
    pairs = list(_pairs(new, old))
    matched = {id(one) for pair in pairs for one in pair}
    unmatched = tuple(one.label for side in (new, old) for one in side.configurations if id(one) not in matched)
    return Comparison(
        old_created=old.created,
        changes={after.label: changes(before, after) for before, after in pairs},
        unmatched=unmatched,
        warnings=(*_benchmark_warnings(old, new), *(text for pair in pairs for text in _pair_warnings(*pair))),
    )


def changes(old: Configuration, new: Configuration) -> dict[str, Change]:
    """By measure, where both sides have it."""
    found = {name: change(_times(old, name), _times(new, name)) for name in COMPARED}
    return {name: one for name, one in found.items() if one}


def _times(one: Configuration, measure: str) -> list[list[float]]:
    """Milliseconds by process."""
    times = [[getattr(run, measure) for run in process.runs] for process in one.processes]
    return [[time for time in found if time is not None] for found in times]


def _pairs(new: Benchmark, old: Benchmark) -> Iterator[tuple[Configuration, Configuration]]:
    """(old, new)"""
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
        yield "the picture was another one then"


def _pair_warnings(old: Configuration, new: Configuration) -> Iterator[str]:
    """What makes two configurations more than an earlier and a later state of the same one."""
    where = f"{new.label}: "
    for name in ("vision", "compute_units", "kv_bits", "decoder", "image_size", "prompt_tokens", "reused_tokens"):
        yield from _difference(where + name, getattr(old, name), getattr(new, name))
    for name in ("encoder", "decoder"):
        yield from _difference(f"{where}bytes of the {name}", old.sizes_bytes[name], new.sizes_bytes[name])
    sources = [one.folder.get("source") for one in (old, new)]
    if sources[0] != sources[1]:
        yield f"{where}the folder came from another checkpoint then"


def _difference(name: str, old: object, new: object) -> Iterator[str]:
    if old != new:
        yield f"{name} was {old}, is {new}"
