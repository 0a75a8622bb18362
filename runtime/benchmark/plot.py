"""The plot of a benchmark: TTFT by stage. It needs matplotlib, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.plot import plain
from ..timings import TTFT_STAGES
from .markdown import milliseconds
from .report import TTFT, Benchmark, Configuration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "preprocess": "#9aa5b1",
    "encode": "#2f6f9f",
    "project": "#6bbf9a",
    "prefill": "#e08e3c",
    "sample": "#b4536a",
    "overhead": "#c9ced4",
    "whole": "#d8d8d8",
}
"""The colours of the parts. They also differ in lightness, for colour-blind readers and prints."""

INK, FAINT = "#24292f", "#6a737d"
ROW_INCHES, BAR = 0.52, 0.62
UPPER, LOWER = 0.15, -0.19
"""The heights in a row of the median's number, and of the whisker with its number, so that they do not overlap."""
ROOM = 1.3
"""The width of the axis as a multiple of the longest bar, with room for the text behind it."""
LABELLED_SHARE = 0.07
"""The share of the longest bar below which a part has no room for its number."""


@dataclass(frozen=True)
class Bar:
    """A row of the plot: parts in milliseconds, end to end, with their total and remarks."""

    label: str
    parts: dict[str, float]
    total: float
    high: float | None = None
    """The p90 of the total."""
    note: str = ""
    measured: bool = True
    """False for times that others published and for estimates."""


def bars_of(configurations: Sequence[Configuration]) -> list[Bar]:
    """Returns a row per configuration."""
    return [bar_of(one) for one in configurations]


def bar_of(one: Configuration) -> Bar:
    """Returns the stages of the median run, which add up to the median TTFT, as in the table."""
    parts = {stage.removesuffix("_ms"): one.middle(stage) or 0.0 for stage in TTFT_STAGES}
    whole, cold = one.summary[TTFT], one.cold(TTFT)
    note = "" if cold is None else f"cold {milliseconds(cold)} ms"
    return Bar(one.label, parts, whole.p50, whole.p90, note)


def figure_of(bars: Sequence[Bar], title: str, subtitle: str = "") -> Figure:
    """Draws stacked bars with their numbers, the longest as wide as the plot."""
    from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps figures alive

    figure = Figure(figsize=(10, 1.8 + ROW_INCHES * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    longest = max(max(bar.total, bar.high or 0) for bar in bars)
    for place, bar in enumerate(reversed(bars)):
        _draw(axes, place, bar, longest)
    axes.set_yticks(range(len(bars)), [plain(bar.label) for bar in reversed(bars)], fontsize=10, color=INK)
    axes.set_xlim(0, ROOM * longest)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    whiskers = ": the median run; the whisker ends at the 90th percentile" if any(bar.high for bar in bars) else ""
    axes.set_xlabel(f"milliseconds to the first token{whiskers}", color=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT)
    axes.grid(axis="x", color="#e7eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    if subtitle:
        figure.supxlabel(plain(subtitle, 140), x=0.012, ha="left", fontsize=8, color=FAINT)
    _legend(figure, bars, title)
    return figure


def figure_of_benchmark(benchmark: Benchmark, others: Sequence[Bar] = ()) -> Figure:
    """Draws the configurations, and below them `others`: published or estimated times."""
    found = benchmark.environment
    versions = f"fastvlm {found.get('fastvlm')}, MLX {found.get('mlx')}"
    subtitle = f"{found.get('chip')}, {found.get('cores')} cores, {found.get('os')}; {versions}"
    return figure_of([*bars_of(benchmark.configurations), *others], "Time to first token", subtitle)


def _draw(axes: Axes, place: int, bar: Bar, longest: float) -> None:
    left = 0.0
    for part, ms in bar.parts.items():
        hatch, edge = ("", "white") if bar.measured else ("////", "white")
        axes.barh(place, ms, left=left, height=BAR, color=COLOURS[part], hatch=hatch, edgecolor=edge, linewidth=0.8,
                  alpha=1.0 if bar.measured else 0.62)  # fmt: skip
        if ms > LABELLED_SHARE * longest and part != "whole":
            ink = INK if part in ("preprocess", "project", "overhead") or not bar.measured else "white"
            axes.text(left + ms / 2, place, milliseconds(ms), ha="center", va="center", fontsize=9, color=ink)
        left += ms
    end, remarks = left, [bar.note] if bar.note else []
    if bar.high is not None and bar.high > left:
        low = place + LOWER
        axes.plot([left, bar.high], [low, low], color=FAINT, linewidth=1.2, solid_capstyle="butt")
        axes.plot([bar.high] * 2, [low - 0.09, low + 0.09], color=FAINT, linewidth=1.2)
        end, remarks = bar.high, [f"p90 {milliseconds(bar.high)} ms", *remarks]
    height = place + UPPER if remarks else place
    axes.annotate(f"{milliseconds(bar.total)} ms", (left, height), xytext=(5, 0), textcoords="offset points",
                  va="center", fontsize=10, color=INK, weight="bold")  # fmt: skip
    if remarks:
        axes.annotate(plain("; ".join(remarks)), (end, place + LOWER), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=8, color=FAINT)  # fmt: skip


def _legend(figure: Figure, bars: Sequence[Bar], title: str) -> None:
    """Draws the legend with the title above it, as a title of the figure would overlap the legend."""
    from matplotlib.patches import Patch

    used = [part for part in COLOURS if part != "whole" and any(part in bar.parts for bar in bars)]
    handles = [Patch(facecolor=COLOURS[part], label=part) for part in used]
    if not all(bar.measured for bar in bars):
        handles.append(Patch(facecolor=COLOURS["whole"], hatch="////", edgecolor="white", label="not measured here"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9,
                  title=plain(title), title_fontproperties={"size": 13, "weight": "bold"}, alignment="left",
                  handlelength=1.1, handleheight=1.0, columnspacing=1.4, labelcolor=INK)  # fmt: skip
