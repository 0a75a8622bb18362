"""What a benchmark found, and its JSON.

`fastvlm bench --json` writes one object (`schema` "fastvlm.benchmark/1"; fields may be added without a new number).
Times are milliseconds of wall clock, sizes are bytes.

    schema          "fastvlm.benchmark/1"
    created         when it began, ISO 8601, UTC
    environment     chip, cores, performance_cores, memory_bytes, os, python, fastvlm, mlx, torch, coremltools, numpy,
                    blas, threads, power, load_average; null where the system does not tell
    workload        image (name, width, height, sha256 of its pixels), prompt, max_tokens, warmup
    configurations  one object for each folder and prompt length:
        label           what tables call it
        folder          path, trained, and from its manifest: source, recipe, tools
        vision          back end of the encoder: coreml, mlx or reference
        compute_units   of coreml: what it may run on; else null, as in older files
        kv_bits         8 where keys and values were kept in 8 bits; else null, as in older files
        decoder         device of the decoder
        image_size      side of the encoder's square in pixels; image_tokens: positions that an image takes
        prompt_tokens   positions of the whole prompt; reused_tokens: of them the fixed beginning, read once at load
        sizes_bytes     encoder, decoder (with projector), other
        notes           what a user should know of this folder on this machine
        processes       one object for each process that measured:
            load_ms, compile_ms     time of loading; of compiling the package, 0 when that was done before
            cold                    the process's first answer, a run as below (null if another came before it)
            peak_memory_bytes       of the whole process, loading included; null where the system does not tell
            mlx_peak_memory_bytes   of what MLX allocated
            runs                    answers after the warm-up: preprocess_ms, encode_ms, project_ms, prefill_ms,
                                    sample_ms, ttft_ms (their sum), decode_tps (null below two tokens),
                                    generated_tokens, answer_ms (the whole answer, timed from outside),
                                    unaccounted_ms (of it, neither stages nor decoding). Not read back.
        summary         of all runs, by stage, and of ttft_ms, decode_tps: n, min, p50, p90, p99. Not read back.
                        Each of its own values in rising order: min and p50 of decode_tps are the slowest answer and
                        the middle one, p99 is nearly the fastest. Tables show milliseconds per token instead.
                        Percentiles of stages do not add up to that of ttft_ms; the stages of a run do.
    comparison      with --compare: see `comparison.py`. Not read back.

Every run encodes its image anew. Reading is strict (`reading.py`): what is missing, of another type, negative or
contradictory is an error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from ..timings import TTFT_STAGES
from .spread import Spread, spread_of

SCHEMA = "fastvlm.benchmark/1"
TTFT, TPS, MS_PER_TOKEN = "ttft_ms", "decode_tps", "ms_per_token"
MEASURES = (*TTFT_STAGES, TTFT, TPS)
"""What a run is asked about."""


@dataclass(frozen=True)
class Run:
    """One answer."""

    preprocess_ms: float
    encode_ms: float
    project_ms: float
    prefill_ms: float
    sample_ms: float
    decode_tps: float | None
    generated_tokens: int
    answer_ms: float
    """The whole answer, timed from outside: time to first token, decoding and what nobody accounts for."""

    @property
    def ttft_ms(self) -> float:
        return sum(getattr(self, stage) for stage in TTFT_STAGES)

    @property
    def ms_per_token(self) -> float | None:
        """Of decoding; None below two tokens."""
        return 1000 / self.decode_tps if self.decode_tps else None

    @property
    def unaccounted_ms(self) -> float:
        """What neither the stages nor the rate of decoding explain of `answer_ms`."""
        decoding = 1000 * (self.generated_tokens - 1) / self.decode_tps if self.decode_tps else 0.0
        return self.answer_ms - self.ttft_ms - decoding

    def as_dict(self) -> dict[str, Any]:
        return {TTFT: self.ttft_ms, **asdict(self), "unaccounted_ms": self.unaccounted_ms}


@dataclass(frozen=True)
class Process:
    """What one process measured."""

    load_ms: float
    compile_ms: float
    cold: Run | None
    peak_memory_bytes: int | None
    mlx_peak_memory_bytes: int
    runs: tuple[Run, ...]

    def as_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("load_ms", "compile_ms", "peak_memory_bytes",
                                                       "mlx_peak_memory_bytes")}  # fmt: skip
        cold = None if self.cold is None else self.cold.as_dict()
        return {**kept, "cold": cold, "runs": [run.as_dict() for run in self.runs]}


@dataclass(frozen=True)
class Configuration:
    """A folder asked with a prompt of one length."""

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

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for process in self.processes for run in process.runs)

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes_bytes.values())

    @property
    def peak_memory_bytes(self) -> int | None:
        return max((one.peak_memory_bytes or 0 for one in self.processes), default=0) or None

    @property
    def mlx_peak_memory_bytes(self) -> int:
        return max(one.mlx_peak_memory_bytes for one in self.processes)

    @cached_property
    def summary(self) -> dict[str, Spread]:
        """By measure; without those that no run has."""
        found = {name: spread_of(self.values(name)) for name in MEASURES}
        return {name: spread for name, spread in found.items() if spread}

    def values(self, measure: str) -> list[float]:
        """Of every run that has it."""
        return [value for run in self.runs if (value := getattr(run, measure)) is not None]

    def middle(self, measure: str) -> float | None:
        """Of the run whose TTFT is in the middle (of two: their mean), so that its stages add up to the median TTFT."""
        runs = sorted(self.runs, key=lambda run: run.ttft_ms)
        found = [getattr(run, measure) for run in runs[(len(runs) - 1) // 2 : len(runs) // 2 + 1]]
        return None if None in found else fmean(found)

    def cold(self, measure: str) -> float | None:
        """The median of the processes' first answers."""
        found = [getattr(one.cold, measure) for one in self.processes if one.cold]
        found = [value for value in found if value is not None]
        return median(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        names = ("label", "folder", "vision", "compute_units", "kv_bits", "decoder", "image_size", "image_tokens",
                 "prompt_tokens", "reused_tokens", "sizes_bytes")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "notes": list(self.notes),
            "processes": [process.as_dict() for process in self.processes],
            "summary": {name: spread.as_dict() for name, spread in self.summary.items()},
        }


@dataclass(frozen=True)
class Benchmark:
    created: str
    environment: dict[str, Any]
    workload: dict[str, Any]
    configurations: tuple[Configuration, ...]

    def as_dict(self) -> dict[str, Any]:
        """See the head of this file."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "environment": self.environment,
            "workload": self.workload,
            "configurations": [one.as_dict() for one in self.configurations],
        }
