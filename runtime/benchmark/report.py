"""The result of a benchmark, and its JSON.

`fastvlm bench --report` writes one object with the `schema` "fastvlm.benchmark/1". Fields may be added without a new
number. Times are milliseconds of wall clock, sizes are bytes.

    schema          "fastvlm.benchmark/1"
    created         start of the benchmark, ISO 8601, UTC
    environment     chip, cores, performance_cores, memory_bytes, os, python, fastvlm, mlx, torch, coremltools, numpy,
                    blas, threads, power, load_average, or null where the system does not report it
    workload        image (name, width, height, sha256 of its pixels), prompt, max_tokens, warmup
    configurations  one object for each folder and prompt length:
        label           name in tables
        folder          path, trained, and from its manifest: source, recipe, tools
        vision          backend of the encoder: coreml, mlx or reference
        compute_units   the compute units of coreml, null for other backends and in older files. Where Core ML plans
                        less than half of the cost for the engine, its share follows: "CPU_AND_NE (engine 12 %)"
        engine_share    share of the estimated cost, 0 to 1, that Core ML plans for the Neural Engine; null where it is
                        unknown, for compute units without the engine, and in older files
        kv_bits         8 for a KV cache in 8 bits, else null, as in older files
        decoder         device of the decoder
        image_size      side of the encoder's square in pixels, and image_tokens, the positions of an image
        prompt_tokens   positions of the whole prompt, and reused_tokens, the part in the prefix cache since loading
        sizes_bytes     encoder, decoder (with projector), other
        notes           remarks for the user about this folder on this machine
        processes       one object for each process that measured:
            load_ms, compile_ms     time of loading, and of compiling the package, 0 if it was compiled before
            cold                    first answer of the process, a run as below, or null if it was not the first
            peak_memory_bytes       of the process with loading, or null where the system does not report it; on a Mac
                                    its physical footprint, without the vision encoder's process and the engine's
            mlx_peak_memory_bytes   of MLX's allocations
            runs                    answers after the warm-up: preprocess_ms, encode_ms, project_ms, prefill_ms,
                                    sample_ms, ttft_ms (their sum), decode_tps (null below two tokens),
                                    generated_tokens, answer_ms (the whole answer, timed from outside),
                                    unaccounted_ms (answer_ms without stages and decoding). Not read back.
        summary         n, min, p50, p90, p99 over all runs, by stage, and for ttft_ms and decode_tps. Not read back.
                        Values are sorted in rising order. So min of decode_tps is the slowest answer, and p99 is
                        nearly the fastest. Tables show milliseconds per token instead.
                        Percentiles of stages do not add up to that of ttft_ms, but the stages of a run do.
    comparison      with --compare, as defined in `comparison.py`. Not read back.

No run uses a cached image. Reading is strict: missing, negative or contradictory values and wrong types
are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np

from ...models.errors import FastVLMError, ReportError
from ...models.files import read_json_object
from ..timings import TTFT_STAGES

SCHEMA = "fastvlm.benchmark/1"
TTFT, TPS, MS_PER_TOKEN = "ttft_ms", "decode_tps", "ms_per_token"
MEASURES = (*TTFT_STAGES, TTFT, TPS)
"""The measures that a summary has."""


@dataclass(frozen=True)
class Spread:
    """The minimum and percentiles of `n` measurements.

    Percentiles are interpolated, so p99 of a few measurements is close to the largest.
    """

    n: int
    min: float
    p50: float
    p90: float
    p99: float

    def as_dict(self) -> dict[str, float]:
        """Returns the fields."""
        return asdict(self)


def spread_of(values: Sequence[float]) -> Spread | None:
    """Returns the spread of `values`, or None without any."""
    if not values:
        return None
    lowest, *percentiles = np.percentile(np.asarray(values, np.float64), [0, 50, 90, 99])
    return Spread(len(values), float(lowest), *map(float, percentiles))


@dataclass(frozen=True)
class Run:
    """The times of one answer."""

    preprocess_ms: float
    encode_ms: float
    project_ms: float
    prefill_ms: float
    sample_ms: float
    decode_tps: float | None
    generated_tokens: int
    answer_ms: float
    """The time of the whole answer, measured from outside: TTFT, decoding and unaccounted time."""

    @property
    def ttft_ms(self) -> float:
        """The time to first token, the sum of the stages."""
        return sum(getattr(self, stage) for stage in TTFT_STAGES)

    @property
    def ms_per_token(self) -> float | None:
        """The decoding time per token, or None below two tokens."""
        return 1000 / self.decode_tps if self.decode_tps else None

    @property
    def unaccounted_ms(self) -> float:
        """The part of `answer_ms` that belongs neither to a stage nor to decoding."""
        decoding = 1000 * (self.generated_tokens - 1) / self.decode_tps if self.decode_tps else 0.0
        return self.answer_ms - self.ttft_ms - decoding

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of a report's `runs`."""
        return {TTFT: self.ttft_ms, **asdict(self), "unaccounted_ms": self.unaccounted_ms}


@dataclass(frozen=True)
class Process:
    """The measurements of one process."""

    load_ms: float
    compile_ms: float
    cold: Run | None
    peak_memory_bytes: int | None
    mlx_peak_memory_bytes: int
    runs: tuple[Run, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of a report's `processes`."""
        kept = {name: getattr(self, name) for name in ("load_ms", "compile_ms", "peak_memory_bytes",
                                                       "mlx_peak_memory_bytes")}  # fmt: skip
        cold = None if self.cold is None else self.cold.as_dict()
        return {**kept, "cold": cold, "runs": [run.as_dict() for run in self.runs]}


@dataclass(frozen=True)
class Configuration:
    """The measurements of a folder with a prompt of one length. The fields are defined at the top of this file."""

    label: str
    folder: dict[str, Any]
    vision: str
    compute_units: str | None
    kv_bits: int | None
    decoder: str
    image_size: int
    image_tokens: int
    prompt_tokens: int
    reused_tokens: int
    sizes_bytes: dict[str, int]
    notes: tuple[str, ...]
    processes: tuple[Process, ...]
    engine_share: float | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of all processes."""
        return tuple(run for process in self.processes for run in process.runs)

    @property
    def total_bytes(self) -> int:
        """The size of the folder on disk."""
        return sum(self.sizes_bytes.values())

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest peak of a process, or None if the system does not report it."""
        return max((one.peak_memory_bytes or 0 for one in self.processes), default=0) or None

    @property
    def mlx_peak_memory_bytes(self) -> int:
        """The largest peak of MLX's allocations in a process."""
        return max(one.mlx_peak_memory_bytes for one in self.processes)

    @cached_property
    def summary(self) -> dict[str, Spread]:
        """The spread by measure, for measures that at least one run has."""
        found = {name: spread_of(self.values(name)) for name in MEASURES}
        return {name: spread for name, spread in found.items() if spread}

    def values(self, measure: str) -> list[float]:
        """Returns the values of one measure over all runs that have it."""
        return [value for run in self.runs if (value := getattr(run, measure)) is not None]

    def middle(self, measure: str) -> float | None:
        """Returns a measure of the run with the median TTFT, so that its stages add up to it.

        With an even number of runs it is the mean over the two runs in the middle.
        """
        runs = sorted(self.runs, key=lambda run: run.ttft_ms)
        found = [getattr(run, measure) for run in runs[(len(runs) - 1) // 2 : len(runs) // 2 + 1]]
        return None if None in found else fmean(found)

    def cold(self, measure: str) -> float | None:
        """Returns the median of a measure over the cold answers."""
        found = [getattr(one.cold, measure) for one in self.processes if one.cold]
        found = [value for value in found if value is not None]
        return median(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of a report's `configurations`."""
        names = ("label", "folder", "vision", "compute_units", "engine_share", "kv_bits", "decoder", "image_size",
                 "image_tokens", "prompt_tokens", "reused_tokens", "sizes_bytes")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "notes": list(self.notes),
            "processes": [process.as_dict() for process in self.processes],
            "summary": {name: spread.as_dict() for name, spread in self.summary.items()},
        }


@dataclass(frozen=True)
class Benchmark:
    """The measurements of one or more configurations on one machine."""

    created: str
    environment: dict[str, Any]
    workload: dict[str, Any]
    configurations: tuple[Configuration, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the object defined at the top of this file."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "environment": self.environment,
            "workload": self.workload,
            "configurations": [one.as_dict() for one in self.configurations],
        }


SUM_TOLERANCE = 0.01
"""The share of ttft_ms by which the sum of its stages may differ from it."""

MOST = 2**53
"""The upper bound of times, sizes and counts. Whole numbers above it are not exact in every JSON reader."""

T = TypeVar("T")


def read_benchmark(path: str | Path) -> Benchmark:
    """Reads a report of `fastvlm bench`. Raises ReportError, which names the invalid field."""
    path = Path(path)
    values = read_json_object(path, ReportError)
    if values.get("schema") != SCHEMA:
        raise ReportError(
            f"{path} must be a report of `fastvlm bench` with the schema {SCHEMA} (got {values.get('schema')!r:.40})."
        )
    try:
        return benchmark_from(values)
    except ReportError as reason:
        raise ReportError(f"{path} is not a valid report of a benchmark: {reason}.") from None


def benchmark_from(values: Mapping[str, Any]) -> Benchmark:
    """Reads the object that `report.py` defines. Raises ReportError."""
    return Benchmark(
        created=_text(values, "created"),
        environment=_object(values, "environment"),
        workload=_object(values, "workload"),
        configurations=_several(values, "configurations", configuration_from),
    )


def configuration_from(values: Mapping[str, Any]) -> Configuration:
    """Reads a configuration. Raises ReportError."""
    counts = ("image_size", "image_tokens", "prompt_tokens", "reused_tokens")
    sizes = _object(values, "sizes_bytes")
    return Configuration(
        label=_text(values, "label"),
        folder=_object(values, "folder"),
        vision=_text(values, "vision"),
        compute_units=None if values.get("compute_units") is None else _text(values, "compute_units"),
        kv_bits=None if values.get("kv_bits") is None else _count(values, "kv_bits"),
        decoder=_text(values, "decoder"),
        **{name: _count(values, name) for name in counts},
        sizes_bytes={name: _count(sizes, name) for name in ("encoder", "decoder", "other")},
        notes=_texts(values, "notes"),
        processes=_several(values, "processes", process_from),
        engine_share=None if values.get("engine_share") is None else _share(values, "engine_share"),
    )


def process_from(values: Mapping[str, Any]) -> Process:
    """Reads a process. Raises ReportError."""
    has_peak = values.get("peak_memory_bytes") is not None
    return Process(
        load_ms=_number(values, "load_ms"),
        compile_ms=_number(values, "compile_ms"),
        cold=None if values.get("cold") is None else run_from(_object(values, "cold")),
        peak_memory_bytes=_count(values, "peak_memory_bytes") if has_peak else None,
        mlx_peak_memory_bytes=_count(values, "mlx_peak_memory_bytes"),
        runs=_several(values, "runs", run_from),
    )


def run_from(values: Mapping[str, Any]) -> Run:
    """Reads a run. Raises ReportError, also if the stages do not add up to the time to first token."""
    run = Run(
        **{stage: _number(values, stage) for stage in TTFT_STAGES},
        decode_tps=None if values.get("decode_tps") is None else _number(values, "decode_tps"),
        generated_tokens=_count(values, "generated_tokens"),
        answer_ms=_number(values, "answer_ms"),
    )
    ttft = _number(values, TTFT)
    if abs(run.ttft_ms - ttft) > SUM_TOLERANCE * ttft:
        raise ReportError(f"ttft_ms must be the sum of the run's stages, {run.ttft_ms:.3f} (got {ttft:.3f})")
    return run


def _several(values: Mapping[str, Any], key: str, read: Callable[[Mapping[str, Any]], T]) -> tuple[T, ...]:
    """Reads a list of at least one object."""
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise ReportError(f"{key} must be a list of at least one object")
    several = []
    for index, one in enumerate(found):
        try:
            several.append(read(one))
        except FastVLMError as reason:
            raise ReportError(f"{key}[{index}]: {reason}") from None
    return tuple(several)


def _number(values: Mapping[str, Any], key: str) -> float:
    found = values.get(key)
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 <= found < MOST:  # False for NaN too
        raise ReportError(f"{key} must be a number of at least 0 (got {found!r:.60})")
    return float(found)


def _share(values: Mapping[str, Any], key: str) -> float:
    found = _number(values, key)
    if found > 1:
        raise ReportError(f"{key} must be a share from 0 to 1 (got {found:g})")
    return found


def _count(values: Mapping[str, Any], key: str) -> int:
    found = values.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < MOST:
        raise ReportError(f"{key} must be a whole number of at least 0 (got {found!r:.60})")
    return found


def _text(values: Mapping[str, Any], key: str) -> str:
    found = values.get(key)
    if not isinstance(found, str) or not found:
        raise ReportError(f"{key} must be a string (got {found!r:.60})")
    return found


def _texts(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = values.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ReportError(f"{key} must be a list of strings (got {found!r:.60})")
    return tuple(found)


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    if not isinstance(found, dict):
        raise ReportError(f"{key} must be an object (got {found!r:.60})")
    return found
