"""The strict reader of a benchmark's JSON, so that a comparison only uses measured values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...models.errors import FastVLMError, ReportError
from ...models.files import read_json_object
from ..timings import TTFT_STAGES
from .report import SCHEMA, TTFT, Benchmark, Configuration, Process, Run

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
