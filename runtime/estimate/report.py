"""Estimates as Markdown, JSON and bars, each marked as an estimate.

`fastvlm bench --estimate CHIP --json` prints one object with the `schema` "fastvlm.estimate/1":

    schema      "fastvlm.estimate/1"
    estimates   one object for each model, size, prompt length and chip: estimate (true), label, chip, image_size,
                prompt_tokens, ttft_ms, encode_ms, prefill_ms, overhead_ms, low_ms and high_ms (of ttft_ms), most_tps
    checks      one object for each published point and possible chip of its machine: point, chip, efficiency,
                overhead_ms, error and error_left_out (shares of the published time)
    sources     source of each figure of the chips
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..benchmark.markdown import milliseconds, plain, table
from ..benchmark.plot import Bar
from .chips import CHIPS, PAPER, POINTS, SOURCES, chip_named
from .roofline import Check, Estimate, checks
from .work import TEXT_TOKENS

SCHEMA = "fastvlm.estimate/1"

CAVEAT = "An estimate from peak rates and published times, not a measurement. Expect an error of up to a third."
PROMPT = f"The prompt is an image and {TEXT_TOKENS} tokens of text, unless --prompt-tokens sets another length."


def estimate_lines(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Yields the estimates, then the errors of the same roofline on the published times."""
    yield from (CAVEAT, PROMPT, "")
    header = ["estimate, ms", "chip", "TTFT", "range", "encode", "prefill", "overhead", "tokens/s at most"]
    yield from table(header, [_row(one) for one in estimates])
    yield from ("", *check_lines(), "", *source_lines([one.chip for one in estimates]))


def _row(one: Estimate) -> list[str]:
    times = (one.encode_ms, one.prefill_ms, one.overhead_ms)
    return [
        f"{plain(one.label)}, {one.image_size} px, {one.prompt_tokens} prompt tokens",
        one.chip,
        f"~ {milliseconds(one.ttft_ms)}",
        f"{milliseconds(one.low_ms)} to {milliseconds(one.high_ms)}",
        *map(milliseconds, times),
        f"{one.most_tps:.0f}",
    ]


def check_lines() -> Iterator[str]:
    """Yields the errors of the roofline on each published point, also with the point left out of the fit."""
    found = checks()
    names = list(dict.fromkeys(one.calibration.chip for one in found))
    header = ["published", "ms", *(f"if {name}" for name in names), *(f"{name}, left out" for name in names)]
    rows = []
    for point in POINTS:
        of_point = [one for one in found if one.point == point]
        rows.append([point.label, f"{point.ttft_ms:g}", *(f"{one.fitted:+.0%}" for one in of_point),
                     *(f"{one.left_out:+.0%}" for one in of_point)])  # fmt: skip
    yield f"Error on the published times ({PAPER}), for each possible chip of the machine:"
    yield from ("", *table(header, rows), "")
    fits = list(dict.fromkeys(one.calibration for one in found))
    yield "Fitted: " + "; ".join(
        f"if {fit.chip}, efficiency {fit.efficiency:.2f} and {fit.overhead_ms:.1f} ms overhead" for fit in fits
    )


def source_lines(names: Sequence[str]) -> Iterator[str]:
    """Yields the sources of the figures of these chips."""
    used = dict.fromkeys(source for name in dict.fromkeys(names) for source in chip_named(name).sources)
    yield from (f"- {source}: {SOURCES[source]}" for source in used)


def chip_lines() -> Iterator[str]:
    """Yields a table of all chips with their figures and sources."""
    header = ["chip", "engine, float16 TFLOPS", "int8 TOPS", "GPU, TFLOPS", "memory, GB/s", "sources"]
    rows = [
        [chip.name, f"{chip.engine_tflops:g}", f"{chip.engine_int8_tops:g}", f"{chip.gpu_tflops:g}",
         f"{chip.memory_gbps:g}", ", ".join(dict.fromkeys(chip.sources))]
        for chip in CHIPS
    ]  # fmt: skip
    yield from (*table(header, rows), "", *source_lines([chip.name for chip in CHIPS]))


def published_lines() -> Iterator[str]:
    """Yields the published times, to print below measured ones."""
    yield f"Not measured here: {PAPER}, encode and prefill"
    yield from ("", *table(["", "TTFT, ms"], [[point.label, f"{point.ttft_ms:g}"] for point in POINTS]))


def as_dict(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Returns the object defined at the top of this file."""
    sources = {source: SOURCES[source] for one in estimates for source in chip_named(one.chip).sources}
    return {
        "schema": SCHEMA,
        "estimates": [one.as_dict() for one in estimates],
        "checks": [_check(one) for one in checks()],
        "sources": sources,
    }


def _check(one: Check) -> dict[str, Any]:
    fit = one.calibration
    return {
        "point": one.point.label,
        "published_ms": one.point.ttft_ms,
        "source": one.point.source,
        "chip": fit.chip,
        "efficiency": fit.efficiency,
        "overhead_ms": fit.overhead_ms,
        "error": one.fitted,
        "error_left_out": one.left_out,
    }


def estimate_bars(estimates: Sequence[Estimate]) -> list[Bar]:
    """Returns the bars of estimates for a plot."""
    return [
        Bar(
            f"{one.label}, {one.image_size} px, {one.chip}",
            {"encode": one.encode_ms, "prefill": one.prefill_ms, "overhead": one.overhead_ms},
            one.ttft_ms,
            note=f"estimate, {milliseconds(one.low_ms)} to {milliseconds(one.high_ms)} ms",
            measured=False,
        )
        for one in estimates
    ]


def published_bars() -> list[Bar]:
    """Returns the bars of the published times for a plot."""
    return [Bar(point.label, {"whole": point.ttft_ms}, point.ttft_ms, note="published", measured=False)
            for point in POINTS]  # fmt: skip
