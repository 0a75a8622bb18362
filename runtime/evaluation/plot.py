"""The plot of an evaluation: accuracy by kind, and confusion tables. It needs matplotlib, an optional dependency."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...models.errors import MachineError
from .report import Answer, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
"""The number of confusion tables in a row of the figure."""
OTHER = "other"
"""The label of the last column, which counts answers with none of the words."""
BAR_COLOUR, ALL_COLOUR = "#3b6ea8", "#274768"


def require_matplotlib(instead: str = "--samples") -> None:
    """Raises MachineError unless matplotlib is installed. The message recommends the option `instead`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MachineError(
            f'--plot needs matplotlib. Run `pip install "fastvlm[plot]"`, or use {instead}, which works without it.'
        )


def accuracy_figure(evaluation: Evaluation) -> Figure:
    """Draws bars with 95 % intervals, and a confusion table for each kind whose answers choose between words."""
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
    """Draws the accuracy of each kind with its 95 % interval."""
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
    """Draws counts with a row per expected word and a column per given word. Shades are shares of a row."""
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


def mixups(answers: Sequence[Answer], words: Sequence[str]) -> np.ndarray:
    """Returns (W, W + 1) counts, int64: rows by the expected word, columns by the given word, the last one for neither.

    Answers whose expected text has none of the words are left out.
    """
    counts = np.zeros((len(words), len(words) + 1), np.int64)
    for answer in answers:
        expected = word_in(answer.sample.answers[0], words)
        if expected is not None:
            given = word_in(answer.text or "", words)
            counts[words.index(expected), len(words) if given is None else words.index(given)] += 1
    return counts


def word_in(text: str, words: Sequence[str]) -> str | None:
    """Returns the first of `words` in `text`, or None. The longest of several wins ('top left' over 'top')."""
    longest_first = sorted(words, key=len, reverse=True)
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text.lower())
    return found[0] if found else None


def _tables(evaluation: Evaluation) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """Returns (kind, words, counts) for each kind with answers."""
    found = []
    for kind, words in evaluation.data.categories.items():
        counts = mixups([one for one in evaluation.answers if one.sample.kind == kind], words)
        if counts.any():
            found.append((kind, words, counts))
    return found


def _widths(with_tables: bool) -> list[float]:
    return [1.3, *([1.0] * COLUMNS)] if with_tables else [1.0]


def plain(text: str, most: int = 60) -> str:
    """Returns the last `most` characters of untrusted text, printable and without formula signs."""
    return escaped("".join(c for c in text if c.isprintable())[-most:])


def escaped(text: str) -> str:
    """Returns text in which matplotlib does not find formulas."""
    return text.replace("$", r"\$")
