"""A benchmark as Markdown that is also readable unrendered, for terminals, issues and READMEs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..timings import TTFT_STAGES
from .comparison import COMPARED, Comparison, TimeChange
from .machine import VERSIONS
from .report import MS_PER_TOKEN, TPS, TTFT, Benchmark, Configuration, spread_of

MISSING = "-"
STAGE_ROWS = (*TTFT_STAGES, TTFT, MS_PER_TOKEN)

FOOTPRINT = (
    "peak memory is the physical footprint of the process that answers: the vision encoder's own process and the "
    "service that runs the Neural Engine are not in it"
)
SUMS = "stages of the median run add up to its TTFT, other columns are sorted row by row and need not"


def report(benchmark: Benchmark, comparison: Comparison | None = None) -> Iterator[str]:
    """Yields the lines: each configuration by stage, a table of all of them, the machine, the comparison."""
    for one in benchmark.configurations:
        yield from (f"**{plain(one.label)}**: {_what(one)}", "", *stages(one), "")
    if len(benchmark.configurations) > 1:
        yield from (*overview(benchmark.configurations), "")
    yield from about(benchmark)
    if comparison:
        yield from ("", *changes(comparison))


def stages(one: Configuration) -> list[str]:
    """Returns a table in milliseconds: each stage, TTFT, and decoding per token."""
    names = {TTFT: "**TTFT**"}
    if rate := one.summary.get(TPS):
        names[MS_PER_TOKEN] = f"decode, ms per token ({_rate(rate.p50)} tokens/s)"
    rows = []
    for measure in STAGE_ROWS:
        if spread := spread_of(one.values(measure)):
            shown = [one.middle(measure), spread.min, spread.p50, spread.p90, spread.p99, one.cold(measure)]
            rows.append([names.get(measure, measure.removesuffix("_ms")), *map(milliseconds, shown)])
    return table(["ms", "median run", "min", "p50", "p90", "p99", "cold"], rows)


def overview(configurations: Sequence[Configuration]) -> list[str]:
    """Returns a table with a row per configuration: medians, memory and sizes."""
    header = ["", "TTFT, ms", "encode", "prefill", "cold TTFT", "tokens/s", "peak memory", "of MLX", "on disk"]
    rows = [
        [
            plain(one.label),
            milliseconds(one.summary[TTFT].p50),
            milliseconds(one.summary["encode_ms"].p50),
            milliseconds(one.summary["prefill_ms"].p50),
            milliseconds(one.cold(TTFT)),
            _rate(one.summary[TPS].p50 if TPS in one.summary else None),
            megabytes(one.peak_memory_bytes),
            megabytes(one.mlx_peak_memory_bytes),
            megabytes(one.total_bytes),
        ]
        for one in configurations
    ]
    return table(header, rows)


def about(benchmark: Benchmark) -> Iterator[str]:
    """Yields a list of the machine, the versions and the workload."""
    found, one = benchmark.environment, benchmark.configurations[0]
    cores = f"{found.get('cores')} cores"
    if found.get("performance_cores"):
        cores += f" ({found['performance_cores']} of them performance cores)"
    machine = [found.get("chip"), cores, _gigabytes(found.get("memory_bytes")), found.get("os"), found.get("power")]
    yield f"- {SUMS}"
    yield f"- machine: {', '.join(plain(str(word)) for word in machine if word)}"
    versions = ", ".join(f"{name} {found[name]}" for name in ("fastvlm", "python", *VERSIONS) if found.get(name))
    yield f"- versions: {plain(versions)}"
    threads = f", OMP_NUM_THREADS={found['threads']}" if found.get("threads") else ""
    units = f" ({plain(one.compute_units)})" if one.compute_units else ""
    kv_bits = f", keys and values in {one.kv_bits} bits" if one.kv_bits else ""
    yield f"- vision: {one.vision}{units}; decoder: {plain(one.decoder)}{kv_bits}, BLAS {found.get('blas')}{threads}"
    if str(found.get("os")).startswith("macOS"):
        yield f"- {FOOTPRINT}"
    asked, image = benchmark.workload, benchmark.workload.get("image") or {}
    yield (
        f"- asked: {plain(repr(asked.get('prompt')))} about {plain(str(image.get('name')))} "
        f"({image.get('width')} x {image.get('height')}), {asked.get('max_tokens')} tokens each time"
    )
    yield (
        f"- runs: {len(one.processes)} x {len(one.processes[0].runs)}, each process after a cold answer and "
        f"{asked.get('warmup')} to warm up; load average at the beginning {found.get('load_average', 0):.1f}"
    )


def changes(comparison: Comparison) -> Iterator[str]:
    """Yields the comparison with an earlier benchmark, differences of the setup first."""
    yield f"Compared with the benchmark of {plain(comparison.old_created)}:"
    for text in comparison.warnings:
        yield f"- not the same: {plain(text)}"
    for label in comparison.unmatched:
        yield f"- only in one of the two: {plain(label)}"
    for label, found in comparison.changes.items():
        rows = [_change_row(measure, found[measure]) for measure in COMPARED if measure in found]
        yield ""
        yield from table([plain(label), "was, ms", "is, ms", "change", "95 % interval", "p", "verdict"], rows)


def _change_row(measure: str, one: TimeChange) -> list[str]:
    name = {TTFT: "**TTFT**", MS_PER_TOKEN: "decode, per token"}.get(measure, measure.removesuffix("_ms"))
    interval = MISSING if one.low is None or one.high is None else f"{_percent(one.low)} to {_percent(one.high)}"
    return [
        name,
        milliseconds(one.old),
        milliseconds(one.new),
        _percent(one.ratio),
        interval,
        f"{one.p:.3f}",
        one.verdict,
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table with padded columns, all but the first aligned right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return [row(lines[0]), f"|{rule}|", *map(row, lines[1:])]


def megabytes(count: int | None) -> str:
    """Returns bytes as decimal megabytes."""
    return MISSING if count is None else f"{count / 1e6:,.1f} MB"


def _what(one: Configuration) -> str:
    sizes = one.sizes_bytes
    reused = f", {one.reused_tokens} of them read at load" if one.reused_tokens else ""
    recipe: Any = one.folder.get("recipe")
    scheme = f", {recipe['quant']}" if isinstance(recipe, dict) and isinstance(recipe.get("quant"), str) else ""
    return (
        f"{one.image_size} px, {one.image_tokens} image tokens{plain(scheme)}; "
        f"{one.prompt_tokens} prompt tokens{reused}; "
        f"encoder {megabytes(sizes['encoder'])}, decoder {megabytes(sizes['decoder'])}; "
        f"peak memory {megabytes(one.peak_memory_bytes)}, of MLX {megabytes(one.mlx_peak_memory_bytes)}"
        + (f"; Core ML on {plain(one.compute_units)}" if one.compute_units else "")
        + ("" if one.folder.get("trained") else "; random weights")
    )


def milliseconds(value: float | None) -> str:
    """Returns a number with three significant digits and without a unit: 0.36, 12.3, 904."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _gigabytes(count: object) -> str:
    return f"{count / 2**30:.0f} GiB" if isinstance(count, int) else ""


def plain(text: str) -> str:
    """Returns untrusted text on one line, without characters that Markdown or a terminal interprets."""
    return "".join(c if c.isprintable() and c not in "|`<>*" else "?" for c in text)[:120]
