"""The plot of stages: the content of the axes, not their looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fastvlm.runtime.benchmark.plot import bar_of, figure_of_benchmark
from fastvlm.runtime.benchmark.report import Benchmark
from fastvlm.runtime.estimate.report import published_bars


def test_stages_of_a_bar_add_up_to_the_median_time(make: Callable) -> None:
    one = make([[30.0, 31.0, 35.0], [29.0, 33.0, 50.0]])
    bar = bar_of(one)
    assert sum(bar.parts.values()) == pytest.approx(one.summary["ttft_ms"].p50)
    assert (bar.total, bar.high) == (one.summary["ttft_ms"].p50, one.summary["ttft_ms"].p90)
    assert bar.parts["encode"] > bar.parts["prefill"] > bar.parts["sample"]


def test_every_configuration_is_drawn(benchmark_of: Callable[..., Benchmark], make: Callable, tmp_path: Path) -> None:
    found = benchmark_of(make(label="a $x$"), make([[60.0]], label="b"))
    figure = figure_of_benchmark(found, published_bars())
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["b", r"a \$x\$"]
    assert len(axes.get_yticklabels()) == 6
    figure.savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_median_and_p90_are_written_at_their_places(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    one = make([[30.0, 31.0, 35.0], [29.0, 33.0, 50.0]])
    (axes,) = figure_of_benchmark(benchmark_of(one)).axes
    whole = one.summary["ttft_ms"]
    places = {text.get_text(): text.xy[0] for text in axes.texts if hasattr(text, "xy")}
    assert places == {
        f"{whole.p50:.1f} ms": pytest.approx(whole.p50),
        f"p90 {whole.p90:.1f} ms; cold 92.0 ms": pytest.approx(whole.p90),
    }
