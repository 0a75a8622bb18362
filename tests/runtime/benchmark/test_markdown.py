"""The tables: rows and columns of the stages, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fastvlm.runtime.benchmark.comparison import compare
from fastvlm.runtime.benchmark.markdown import report, stages
from fastvlm.runtime.benchmark.report import Benchmark, Configuration

RATES = (80.0, 100.0, 120.0, 200.0, 300.0)


def cells(one: Configuration) -> dict[str, list[str]]:
    """Returns the cells by the name of their row. The header is `ms`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in stages(one) if not line.startswith("|-")]
    return {name: found for name, *found in rows}


def uneven(make: Callable) -> Configuration:
    """Returns runs with a slow encoder where prefill is fast, and with different decoding rates."""
    one = make([[30.0, 50.0, 40.0, 20.0, 90.0]])
    (process,) = one.processes
    prefills = (90.0, 10.0, 10.0, 12.0, 11.0)
    runs = tuple(
        replace(run, prefill_ms=prefill, decode_tps=rate)
        for run, prefill, rate in zip(process.runs, prefills, RATES, strict=True)
    )
    return replace(one, processes=(replace(process, runs=runs),))


def test_median_run_adds_up_to_the_median_ttft(make: Callable) -> None:
    found = cells(uneven(make))
    column, p50 = found["ms"].index("median run"), found["ms"].index("p50")
    times = {name: [float(cell) for cell in row] for name, row in found.items() if name != "ms"}
    parts = [times[name] for name in ("preprocess", "encode", "project", "prefill", "sample")]
    whole = times["**TTFT**"]
    assert sum(row[column] for row in parts) == pytest.approx(whole[column], rel=0.01)
    assert whole[column] == whole[p50]
    assert sum(row[p50] for row in parts) != pytest.approx(whole[p50], rel=0.05)  # so the median run has a column


def test_decoding_is_in_milliseconds_with_the_slowest_last(make: Callable) -> None:
    found = cells(uneven(make))
    row = next(row for name, row in found.items() if name.startswith("decode"))
    assert "decode, ms per token (120.0 tokens/s)" in found
    least, middle, *high = (float(row[found["ms"].index(name)]) for name in ("min", "p50", "p90", "p99"))
    assert least == pytest.approx(1000 / 300, rel=0.01)
    assert middle == pytest.approx(1000 / 120, rel=0.01)
    assert least < middle < high[0] < high[1] <= 12.5


def test_answers_of_one_token_have_no_decoding_row(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    one = make()
    (process,) = one.processes
    short = replace(process, cold=None, runs=tuple(replace(run, decode_tps=None) for run in process.runs))
    text = "\n".join(report(benchmark_of(replace(one, processes=(short,)))))
    assert "decode, ms" not in text
    assert "stages of the median run add up" in text


@pytest.mark.parametrize(("system", "said"), [("macOS 15.1", True), ("Linux 6.1", False)])
def test_peak_memory_on_a_mac_says_what_it_leaves_out(
    benchmark_of: Callable[..., Benchmark], system: str, said: bool
) -> None:
    assert ("the service that runs the Neural Engine" in "\n".join(report(benchmark_of(os=system)))) == said


STEADY = [[30.0, 30.4, 30.2, 30.6, 30.1], [30.3, 30.5, 30.2, 30.7, 30.0], [29.9, 30.2, 30.4, 30.1, 30.3]]


SLOWER = [[1.3 * value for value in one] for one in STEADY]


def test_comparison_has_every_stage_and_verdict(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    new = benchmark_of(make(SLOWER), make(label="evil | `name`\n"))
    text = "\n".join(report(new, compare(new, benchmark_of(make(STEADY), chip="Apple M1"))))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    for name in ("preprocess", "encode", "project", "prefill", "sample", "**TTFT**"):
        assert name in rows
    assert "slower" in text
    assert "- not the same: chip was Apple M1, is Apple M4" in text
    assert "evil ? ?name??" in text
    widths = [{line.count("|") for line in block.splitlines() if line.startswith("|")} for block in text.split("\n\n")]
    assert all(len(found) <= 1 for found in widths)  # no cell broke a row
