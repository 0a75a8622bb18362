"""Accuracies by kind, and what is taken for what, as a picture. Needs matplotlib, an optional dependency."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np

from ...models.errors import MachineError
from .mixups import OTHER, mixups
from .report import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
"""Of confusion tables."""
BAR_COLOUR, ALL_COLOUR = "#3b6ea8", "#274768"


def require_matplotlib(instead: str = "--samples") -> None:
    """Raises MachineError, which names what to use `instead`, unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MachineError(f'--plot needs matplotlib: pip install "fastvlm[plot]", or use {instead}, which does not')


def accuracy_figure(evaluation: Evaluation) -> Figure:
    """Bars with 95 % intervals, and a confusion table for each kind whose answers choose between words."""
    from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps figures alive

    tables = _tables(evaluation)
    rows = -(-len(tables) // COLUMNS)
    width, height = (6.5 + (4.6 * COLUMNS if tables else 0), max(3.6, 4.2 * rows))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(max(rows, 1), 1 + (COLUMNS if tables else 0), width_ratios=_widths(bool(tables)))
    figure.suptitle(escaped(evaluation.title), fontsize=11)
    draw_bars(figure.add_subplot(grid[:, 0]), evaluation)
    for index, (kind, words, counts) in enumerate(tables):
        axes = figure.add_subplot(grid[index // COLUMNS, 1 + index % COLUMNS])
        draw_table(axes, kind, words, counts)
    return figure


def draw_bars(axes: Axes, evaluation: Evaluation) -> None:
    rows = evaluation.rows
    places = np.arange(len(rows))[::-1]
    shares = np.array([100 * row.accuracy for row in rows.values()])
    low = shares - [100 * row.low for row in rows.values()]
    high = np.array([100 * row.high for row in rows.values()]) - shares
    colours = [BAR_COLOUR] * (len(rows) - 1) + [ALL_COLOUR]
    axes.barh(places, shares, xerr=np.clip([low, high], 0, None), color=colours, height=0.62, ecolor="#555", capsize=3)
    for place, share, row in zip(places, shares, rows.values(), strict=True):
        axes.text(103, place, f"{share:.1f}%\n{row.n:,}", va="center", fontsize=8, color="#333")
    axes.set_yticks(places, [plain(kind) for kind in rows])
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy in percent, with its 95% interval; number of questions")
    axes.spines[["top", "right"]].set_visible(False)


def draw_table(axes: Axes, kind: str, words: tuple[str, ...], counts: np.ndarray) -> None:
    """Rows: the word expected; columns: the word given. Shades are shares of a row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.6 else "#222"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(words) + 1), [*words, OTHER], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.set_title(kind, fontsize=10)
    axes.set_xlabel("given", fontsize=8)
    axes.set_ylabel("expected", fontsize=8)


def _tables(evaluation: Evaluation) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """(kind, words, counts) of the kinds that were asked about."""
    found = []
    for kind, words in evaluation.data.categories.items():
        counts = mixups([one for one in evaluation.answers if one.sample.kind == kind], words)
        if counts.any():
            found.append((kind, words, counts))
    return found


def _widths(with_tables: bool) -> list[float]:
    return [1.3, *([1.0] * COLUMNS)] if with_tables else [1.0]


def plain(text: str, most: int = 60) -> str:
    """A stranger's text, its last `most` characters, as it is to be shown."""
    return escaped("".join(c for c in text if c.isprintable())[-most:])


def escaped(text: str) -> str:
    """Without the signs that matplotlib reads as formulas."""
    return text.replace("$", r"\$")
