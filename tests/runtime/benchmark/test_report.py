"""The figures of a report, and its strict reader."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import ReportError
from fastvlm.runtime.benchmark.report import Benchmark, Run, read_benchmark, spread_of


def test_unaccounted_time_is_without_stages_and_decoding() -> None:
    run = Run(1, 2, 3, 4, 5, decode_tps=100.0, generated_tokens=3, answer_ms=40.0)
    assert run.ttft_ms == 15
    assert run.unaccounted_ms == pytest.approx(40 - 15 - 20)


def test_spread_interpolates() -> None:
    found = spread_of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.n, found.min, found.p50, found.p90) == (5, 1.0, 3.0, 4.6)
    assert spread_of([]) is None


def test_written_report_is_read_back(benchmark_of: Callable[..., Benchmark], make: Callable, tmp_path: Path) -> None:
    found = benchmark_of(
        make([[30.0, 31.0], [29.0, 32.0]]),
        make(label="other", notes=("a note",), compute_units="ALL", engine_share=0.75, kv_bits=8),
    )
    file = tmp_path / "b.json"
    file.write_text(json.dumps(found.as_dict()))
    assert read_benchmark(file) == found


def test_older_report_without_new_fields_is_read(benchmark_of: Callable[..., Benchmark], tmp_path: Path) -> None:
    report = benchmark_of().as_dict()
    for name in ("compute_units", "engine_share", "kv_bits"):
        del report["configurations"][0][name]
    file = tmp_path / "b.json"
    file.write_text(json.dumps(report))
    assert read_benchmark(file) == benchmark_of()


RUN = ("configurations", 0, "processes", 0, "runs", 0)
WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    (("schema",), "fastvlm.evaluation/1", "must be a report of `fastvlm bench`"),
    (("created",), 5, "created must be a string"),
    (("environment",), [], "environment must be an object"),
    (("configurations",), [], "configurations must be a list of at least one object"),
    (("configurations", 0, "label"), "", "configurations[0]: label must be a string"),
    (("configurations", 0, "kv_bits"), "8", "kv_bits must be a whole number"),
    (("configurations", 0, "compute_units"), 8, "compute_units must be a string"),
    (("configurations", 0, "engine_share"), 1.5, "engine_share must be a share from 0 to 1"),
    (("configurations", 0, "engine_share"), "12 %", "engine_share must be a number"),
    (("configurations", 0, "image_size"), 256.0, "image_size must be a whole number"),
    (("configurations", 0, "sizes_bytes", "encoder"), -1, "encoder must be a whole number"),
    (("configurations", 0, "notes"), [1], "notes must be a list of strings"),
    (("configurations", 0, "processes", 0, "load_ms"), True, "load_ms must be a number"),
    (("configurations", 0, "processes", 0, "cold"), 3, "cold must be an object"),
    (("configurations", 0, "processes", 0, "runs"), {}, "processes[0]: runs must be a list"),
    ((*RUN, "encode_ms"), None, "runs[0]: encode_ms must be a number"),
    ((*RUN, "encode_ms"), "30", "encode_ms must be a number"),
    ((*RUN, "encode_ms"), 1e300, "encode_ms must be a number"),
    ((*RUN, "encode_ms"), -1.0, "encode_ms must be a number"),
    ((*RUN, "ttft_ms"), 43.0, "ttft_ms must be the sum of the run's stages, 42.000 (got 43.000)"),
    ((*RUN, "generated_tokens"), 8.5, "generated_tokens must be a whole number"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_invalid_value_is_named(
    benchmark_of: Callable[..., Benchmark], tmp_path: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    report = copy.deepcopy(benchmark_of().as_dict())
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file = tmp_path / "b.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ReportError) as caught:
        read_benchmark(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": NaN}'])
def test_file_that_is_not_a_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "b.json"
    file.write_text(text)
    with pytest.raises(ReportError, match=r"b\.json"):
        read_benchmark(file)


def test_nan_is_refused(benchmark_of: Callable[..., Benchmark], tmp_path: Path) -> None:
    report = benchmark_of().as_dict()
    report["configurations"][0]["processes"][0]["load_ms"] = float("nan")
    file = tmp_path / "b.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ReportError, match="NaN is not a JSON number"):
        read_benchmark(file)
