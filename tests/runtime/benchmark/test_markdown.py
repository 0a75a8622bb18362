"""The table of stages: what its rows and columns say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fastvlm.runtime.benchmark.markdown import report, stages
from fastvlm.runtime.benchmark.report import Benchmark, Configuration

RATES = (80.0, 100.0, 120.0, 200.0, 300.0)


def cells(one: Configuration) -> dict[str, list[str]]:
    """By the row's name; the header is `ms`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in stages(one) if not line.startswith("|-")]
    return {name: found for name, *found in rows}


def uneven(make: Callable) -> Configuration:
    """Runs in which the encoder is slow when prefill is fast, and that decode at other rates."""
    one = make([[30.0, 50.0, 40.0, 20.0, 90.0]])
    (process,) = one.processes
    prefills = (90.0, 10.0, 10.0, 12.0, 11.0)
    runs = tuple(
        replace(run, prefill_ms=prefill, decode_tps=rate)
        for run, prefill, rate in zip(process.runs, prefills, RATES, strict=True)
    )
    return replace(one, processes=(replace(process, runs=runs),))


def test_the_median_run_adds_up_and_its_ttft_is_the_median(make: Callable) -> None:
    found = cells(uneven(make))
    column, p50 = found["ms"].index("median run"), found["ms"].index("p50")
    times = {name: [float(cell) for cell in row] for name, row in found.items() if name != "ms"}
    parts = [times[name] for name in ("preprocess", "encode", "project", "prefill", "sample")]
    whole = times["**TTFT**"]
    assert sum(row[column] for row in parts) == pytest.approx(whole[column], rel=0.01)
    assert whole[column] == whole[p50]
    assert sum(row[p50] for row in parts) != pytest.approx(whole[p50], rel=0.05)  # why there is a column for it


def test_decoding_is_told_in_milliseconds_with_the_slowest_last(make: Callable) -> None:
    found = cells(uneven(make))
    row = next(row for name, row in found.items() if name.startswith("decode"))
    assert "decode, ms per token (120.0 tokens/s)" in found
    least, middle, *high = (float(row[found["ms"].index(name)]) for name in ("min", "p50", "p90", "p99"))
    assert least == pytest.approx(1000 / 300, rel=0.01)
    assert middle == pytest.approx(1000 / 120, rel=0.01)
    assert least < middle < high[0] < high[1] <= 12.5


def test_answers_of_one_token_have_no_row_of_decoding(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    one = make()
    (process,) = one.processes
    short = replace(process, cold=None, runs=tuple(replace(run, decode_tps=None) for run in process.runs))
    text = "\n".join(report(benchmark_of(replace(one, processes=(short,)))))
    assert "decode, ms" not in text
    assert "its stages add up" in text
