"""Two benchmarks next to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastvlm.runtime.benchmark.comparison import compare
from fastvlm.runtime.benchmark.markdown import report
from fastvlm.runtime.benchmark.report import Benchmark

STEADY = [[30.0, 30.4, 30.2, 30.6, 30.1], [30.3, 30.5, 30.2, 30.7, 30.0], [29.9, 30.2, 30.4, 30.1, 30.3]]
SLOWER = [[1.3 * value for value in one] for one in STEADY]


def test_a_slower_stage_is_told_and_the_others_are_not(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    found = compare(benchmark_of(make(SLOWER)), benchmark_of(make(STEADY)))
    verdicts = {measure: one.verdict for measure, one in found.changes["model"].items()}
    assert verdicts["encode_ms"] == verdicts["ttft_ms"] == "slower"
    assert {verdicts[name] for name in ("preprocess_ms", "project_ms", "prefill_ms", "sample_ms", "ms_per_token")} == {
        "no difference seen"
    }
    assert 0.2 < found.slowdown < 0.25  # 9 of 42 ms
    assert found.warnings == ()


def test_faster_is_no_slowdown(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    found = compare(benchmark_of(make(STEADY)), benchmark_of(make(SLOWER)))
    assert found.changes["model"]["ttft_ms"].verdict == "faster"
    assert found.slowdown == 0.0


def test_what_else_is_different_is_named(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    old = benchmark_of(make(), chip="Apple M1", threads="1")
    new = benchmark_of(make(image_size=512, folder={"path": "m", "trained": True, "source": {"name": "other"}}))
    new = replace(new, workload={**new.workload, "max_tokens": 9, "image": {"sha256": "1"}})
    warnings = compare(new, old).warnings
    assert "chip was Apple M1, is Apple M4" in warnings
    assert "threads was 1, is None" in warnings
    assert "max_tokens was 8, is 9" in warnings
    assert "the picture was another one then" in warnings
    assert "model: image_size was 256, is 512" in warnings
    assert "model: the folder came from another checkpoint then" in warnings


def test_configurations_are_matched_by_label(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
    old = benchmark_of(make(label="a"), make(label="b"))
    found = compare(benchmark_of(make(label="b"), make(label="c")), old)
    assert list(found.changes) == ["b"]
    assert set(found.unmatched) == {"a", "c"}
    single = compare(benchmark_of(make(label="renamed")), benchmark_of(make(label="a")))
    assert list(single.changes) == ["renamed"]


def test_markdown_holds_every_stage_and_verdict(benchmark_of: Callable[..., Benchmark], make: Callable) -> None:
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
