"""Benchmarks with numbers chosen by tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fastvlm.runtime.benchmark.report import Benchmark, Configuration, Process, Run


def run_of(encode_ms: float = 30.0, tps: float | None = 100.0) -> Run:
    decoding = 0.0 if tps is None else 7000 / tps
    return Run(1.0, encode_ms, 0.5, 10.0, 0.5, tps, 8, 12 + encode_ms + decoding + 0.1)


def configuration_of(encode_ms: Sequence[Sequence[float]] = ((30.0,),), **changes: Any) -> Configuration:
    """Returns a configuration from the encoding times of each process's runs."""
    processes = tuple(
        Process(900.0, 0.0, run_of(80.0), 300_000_000, 8_000_000, tuple(map(run_of, times))) for times in encode_ms
    )
    fields: dict[str, Any] = {
        "label": "model",
        "folder": {"path": "model", "trained": True, "source": {"name": "tiny"}, "recipe": {"quant": "int8"}},
        "vision": "reference",
        "compute_units": None,
        "kv_bits": None,
        "decoder": "Device(cpu, 0)",
        "image_size": 256,
        "image_tokens": 16,
        "prompt_tokens": 42,
        "reused_tokens": 14,
        "sizes_bytes": {"encoder": 1_500_000, "decoder": 2_100_000, "other": 50_000},
        "notes": (),
        "processes": processes,
    }
    return Configuration(**{**fields, **changes})


@pytest.fixture
def make() -> Callable[..., Configuration]:
    return configuration_of


@pytest.fixture
def benchmark_of() -> Callable[..., Benchmark]:
    """Returns a function that makes a benchmark. Its keywords change the environment."""

    def make(*configurations: Configuration, **environment: Any) -> Benchmark:
        image = {"name": "shapes.png", "width": 256, "height": 256, "sha256": "0" * 64}
        return Benchmark(
            created="2026-01-02T03:04:05+00:00",
            environment={"chip": "Apple M4", "cores": 10, "mlx": "0.30", "load_average": 0.5, **environment},
            workload={"image": image, "prompt": "Describe the image.", "max_tokens": 8, "warmup": 2},
            configurations=configurations or (configuration_of(),),
        )

    return make
