"""Palettes: a weight as indices into the 2^n values that represent it best.

In one dimension k-means needs no sampling. float16 has 65,536 numbers, so a weight of any size is a histogram. With
prefix sums over its sorted values, each of Lloyd's steps takes a few thousand operations.
"""

from __future__ import annotations

from functools import cache

import numpy as np

MAX_STEPS = 400
"""The most of Lloyd's steps. Trained weights settle within 100, to six digits of their error."""

MAX_EXCHANGES = 64
"""The most exchanges of cells after Lloyd's steps have settled."""
SPLIT_GAIN = 0.75
"""The share of a cell's error that a split removes at uniform density."""

START_BLOCKS = 8
"""The blocks of weights per cluster over which the density is estimated."""


def fit_palette(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (lut, indices): 2^bits ascending float16 values, and the index of the nearest for each weight, uint8.

    `weight` is finite and fits float16. A weight has the same palette on every machine.
    """
    codes = weight.astype(np.float16).view(np.uint16)
    counts = np.bincount(codes.reshape(-1), minlength=1 << 16)
    order = float16_order()
    order = order[counts[order] > 0]
    values = order.view(np.float16).astype(np.float64)
    lut = kmeans(values, counts[order], 1 << bits).astype(np.float16)
    nearest = np.zeros(1 << 16, np.uint8)
    nearest[order] = cells(values, lut.astype(np.float64))
    return lut, nearest[codes]


@cache
def float16_order() -> np.ndarray:
    """Returns the bit patterns of all finite float16 numbers in the order of their values, uint16."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    patterns = patterns[np.isfinite(patterns.view(np.float16))]
    return patterns[np.argsort(patterns.view(np.float16), kind="stable")]


def kmeans(values: np.ndarray, counts: np.ndarray, clusters: int) -> np.ndarray:
    """Returns `clusters` ascending centres of least squared error, for ascending values that occur `counts` times.

    Lloyd's steps run until they settle. Then one exchange merges the two neighbours that lose least and splits the
    cell that gains most. Both repeat while the error falls.
    """
    if len(values) <= clusters:
        return np.concatenate([values, np.repeat(values[-1], clusters - len(values))])
    sums = prefix_sums(values, counts)
    centres, noise = settled(values, sums, starting_centres(values, counts, clusters))
    for _ in range(MAX_EXCHANGES):
        other = exchanged(centres, cell_totals(values, sums, centres))
        if other is None:
            break
        other, other_noise = settled(values, sums, other)
        if other_noise >= noise:
            break
        centres, noise = other, other_noise
    return centres


def settled(values: np.ndarray, sums: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the centres after Lloyd's steps, and the remaining squared error."""
    previous = np.empty(0)
    for _ in range(MAX_STEPS):
        edges = cell_edges(values, centres)
        if np.array_equal(edges, previous):
            break
        previous = edges
        centres = move_centres(centres, np.diff(sums[:, edges]))
    return centres, float(cell_noise(cell_totals(values, sums, centres)).sum())


def exchanged(centres: np.ndarray, totals: np.ndarray) -> np.ndarray | None:
    """Returns the centres after one merger and one split that should lower the error, or None."""
    number, total, _ = totals
    weights = number[1:] * number[:-1] / np.maximum(number[1:] + number[:-1], 1)
    merging = weights * np.diff(centres) ** 2
    noise = cell_noise(totals)
    pair, cell = int(merging.argmin()), int(noise.argmax())
    if SPLIT_GAIN * noise[cell] <= merging[pair] or cell in (pair, pair + 1):
        return None
    spread = np.sqrt(noise[cell] / number[cell])
    both = total[pair : pair + 2].sum() / max(number[pair : pair + 2].sum(), 1)
    kept = np.delete(centres, [pair, pair + 1, cell])
    return np.sort(np.concatenate([kept, [both, centres[cell] - spread, centres[cell] + spread]]))


def cell_totals(values: np.ndarray, sums: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns (3, clusters): weights, sum and sum of squares of each centre's values."""
    return np.diff(sums[:, cell_edges(values, centres)])


def cell_noise(totals: np.ndarray) -> np.ndarray:
    """Returns each cell's squared error about its mean."""
    number, total, squares = totals
    return np.maximum(squares - total**2 / np.maximum(number, 1), 0)


def prefix_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns (3, n + 1): the number of weights before each value, their sum and their sum of squares."""
    rows = np.stack([counts, counts * values, counts * values**2]).astype(np.float64)
    return np.concatenate([np.zeros((3, 1)), rows.cumsum(1)], axis=1)


def starting_centres(values: np.ndarray, counts: np.ndarray, clusters: int) -> np.ndarray:
    """Returns centres with the cube root of the weights' density, the optimum for many clusters (Panter and Dite)."""
    blocks = START_BLOCKS * clusters
    edges = np.searchsorted(counts.cumsum(), np.linspace(0, counts.sum(), blocks + 1)[1:-1])
    edges = np.unique(np.concatenate([[0], edges, [len(values) - 1]]))
    number = np.diff(np.concatenate([[0], counts.cumsum()])[edges])  # about the same in each block
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(number * np.diff(values[edges]) ** 2))])
    return np.interp((np.arange(clusters) + 0.5) / clusters, share / share[-1], values[edges])


def cell_edges(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns the index of the first value nearest to each centre, and the end."""
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[0], np.searchsorted(values, middles), [len(values)]])


def cells(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns the index of the nearest centre for each value."""
    return np.repeat(np.arange(len(centres)), np.diff(cell_edges(values, centres)))


def move_centres(centres: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Moves each centre to the mean of its cell. A centre with an empty cell goes to a cell of large error.

    `totals` (3, clusters): weights, sum and sum of squares of each cell.
    """
    number, total, squares = totals
    with np.errstate(divide="ignore", invalid="ignore"):
        means = total / number
        spread = np.sqrt(np.maximum(squares / number - means**2, 0))
    empty = number == 0
    moved = np.where(empty, centres, means)
    if empty.any():
        noise = np.where(empty, 0, number * np.where(empty, 0, spread) ** 2)
        worst = np.argsort(-noise, kind="stable")[: int(empty.sum())]
        moved[np.flatnonzero(empty)[: len(worst)]] = means[worst] + spread[worst]
        moved = np.sort(np.where(np.isfinite(moved), moved, centres))
    return moved
