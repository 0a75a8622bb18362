"""The schemes that store a convolution's weight in fewer bits: rounding, palettes, error and size.

A palette holds the 2^n values that represent a weight best, and the weight is stored as indices into it. In one
dimension k-means needs no sampling. float16 has 65,536 numbers, so a weight of any size is a histogram. With prefix
sums over its sorted values, each of Lloyd's steps takes a few thousand operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from ..models.errors import UsageError

WEIGHT_SCHEMES = ("fp16", "int8", "int4", "pal8", "pal6", "pal4")
W8A8 = "w8a8"
"""The scheme with int8 weights and int8 inputs of convolutions, which `activations` rounds."""
ENCODER_SCHEMES = (*WEIGHT_SCHEMES, "mixed", W8A8)

MIN_ELEMENTS = 2048
"""The largest number of elements of weights that stay float16. Together they are a ten-thousandth of the bytes."""

MIN_INPUTS = 16
"""The fewest input channels of weights in fewer bits. Depthwise weights have one, and the first has three."""

MIN_WEIGHT_SNR_DB = {"int8": 30.0, "pal8": 30.0, "pal6": 20.0, "int4": 12.0, "pal4": 12.0}
"""The least SNR of a stored weight, by scheme. Trained weights exceed it by 8 dB, and worse ones stay float16."""

ROW_SNR_MARGIN_DB = 12.0
"""The margin below `MIN_WEIGHT_SNR_DB` that a twentieth of a weight's rows may miss. Rows of unequal size miss it: the
largest rows decide over a palette's values, and a weight's own SNR does not show the others."""

MOST_ROW_NOISE = 2.0
"""The most noise of a row in a palette, as a multiple of the row's power. A row that vanishes has 1."""

LEAST_ROW_SNR_DB = {"pal8": 6.0}
"""The SNR that no row of a stored weight may miss. int8 keeps small rows in the same bytes as 8-bit indices, and with
fewer bits such rows may vanish."""

PALETTE_BITS = {"pal8": 8, "pal6": 6, "pal4": 4}
COARSE_PALETTE = "pal4"
"""The scheme whose palettes are worth a table per group of channels: 16 values take 32 bytes."""
PALETTE_GROUP = 32
"""The output channels that share a table where a program can have several (iOS 18), as in Apple's 4-bit presets."""

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7
BLOCKWISE = "int4"
"""The scheme with a scale per block of inputs."""
INT4_BLOCK = 32
"""The number of input channels that share an int4 scale."""

INT4_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""The shares of the full scale that are tried for each int4 block. Slight clipping lowers the error."""


@dataclass(frozen=True)
class LinearWeight:
    """A weight `data * scale`: int8 or int4 data, and a float16 scale per output channel or block of inputs."""

    scheme: str
    data: np.ndarray
    scale: np.ndarray
    """The scales, with the weight's rank and with sizes that divide the weight's."""

    @property
    def nbytes(self) -> int:
        """The stored size."""
        return self.data.size * (4 if self.scheme == "int4" else 8) // 8 + self.scale.nbytes

    def dense(self) -> np.ndarray:
        """Returns the weight as the engine computes it, float32 values rounded to float16."""
        blocks = [part for size, count in zip(self.data.shape, self.scale.shape, strict=True)
                  for part in (count, size // count)]  # fmt: skip
        ones = [part for count in self.scale.shape for part in (count, 1)]
        values = self.data.reshape(blocks) * self.scale.astype(np.float32).reshape(ones)
        return rounded(values.reshape(self.data.shape))


@dataclass(frozen=True)
class PaletteWeight:
    """A weight `lut[indices]`: 2^bits float16 values, and an index of `bits` bits per element.

    With groups each has `PALETTE_GROUP` consecutive output channels and a table of its own.
    """

    scheme: str
    indices: np.ndarray
    """uint8, in the weight's shape."""
    lut: np.ndarray
    """(2^bits,), or (groups, 2^bits)."""

    @property
    def bits(self) -> int:
        """The bits of an index."""
        return PALETTE_BITS[self.scheme]

    @property
    def nbytes(self) -> int:
        """The stored size."""
        return (self.indices.size * self.bits + 7) // 8 + self.lut.nbytes

    def dense(self) -> np.ndarray:
        """Returns the weight as the engine computes it, float32."""
        lut = self.lut.astype(np.float32)
        if lut.ndim == 1:
            return lut[self.indices]
        groups = self.indices.reshape(len(lut), -1)
        return np.take_along_axis(lut, groups.astype(np.intp), 1).reshape(self.indices.shape)


StoredWeight = LinearWeight | PaletteWeight


def check_scheme(scheme: str) -> None:
    """Raises UsageError unless `scheme` is one of `ENCODER_SCHEMES`."""
    if scheme not in ENCODER_SCHEMES:
        raise UsageError(f"quant must be one of {', '.join(ENCODER_SCHEMES)} (got {scheme!r:.40}).", "quant")


def is_candidate(weight: np.ndarray) -> bool:
    """Returns True if a convolution's weight (out, in / groups, K, K) is large enough for fewer bits.

    Depthwise weights stay float16. They are 1 % of FastViTHD's bytes, and would cause 5 dB of int8's noise, because
    each output is a sum of few products, whose errors do not average out.
    """
    return weight.ndim == 4 and weight.shape[1] >= MIN_INPUTS and weight.size > MIN_ELEMENTS


def store(weight: np.ndarray, scheme: str) -> StoredWeight:
    """Stores `weight` (out, in, K, K) float32 in `scheme`, which is not fp16."""
    return _WAYS[scheme](weight)


def stored_if_kept(weight: np.ndarray, scheme: str) -> StoredWeight | None:
    """Stores `weight` in `scheme`, or returns None if it has to stay float16.

    Small and depthwise weights stay float16, and so do weights with a low SNR in `scheme`, or with many rows of low
    SNR. Folded layer scales can be so small that int8's scales, which are float16, underflow.
    """
    if scheme == "fp16" or not is_candidate(weight):
        return None
    stored = store(weight, scheme)
    return stored if is_kept(weight, stored) else None


def is_kept(weight: np.ndarray, stored: StoredWeight) -> bool:
    """Returns True if `stored` keeps `weight` and its rows well enough for its scheme."""
    scheme, kept, least = stored.scheme, stored.dense(), MIN_WEIGHT_SNR_DB[stored.scheme]
    return (
        weight_snr_db(weight, kept) > least
        and low_row_snr_db(weight, kept) > least - ROW_SNR_MARGIN_DB
        and (scheme not in LEAST_ROW_SNR_DB or low_row_snr_db(weight, kept, 0) > LEAST_ROW_SNR_DB[scheme])
    )


def low_row_snr_db(weight: np.ndarray, kept: np.ndarray, share: float = 0.05) -> float:
    """Returns the SNR in dB that all rows but a `share` exceed. Rows of zeros count as kept."""
    rows, noise = (values.reshape(len(weight), -1) for values in (weight, kept - weight))
    signal = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    ratio = signal / np.maximum(np.einsum("ij,ij->i", noise, noise), 1e-20 * signal.max())
    return float(np.quantile(10 * np.log10(np.maximum(ratio, 1e-20))[signal > 0], share))


def weight_snr_db(weight: np.ndarray, kept: np.ndarray) -> float:
    """Returns 10 log10(sum of squares of `weight` / of the differences from `kept`), or 0 for a weight of zeros."""
    signal = float(np.vdot(weight, weight))
    noise = kept - weight
    return 10 * np.log10(signal / max(float(np.vdot(noise, noise)), signal * 1e-20)) if signal else 0.0


def stored_int8(weight: np.ndarray) -> LinearWeight:
    """Stores a weight linearly and symmetrically, with a scale per output channel."""
    largest = np.abs(weight).max((1, 2, 3), keepdims=True)
    scale = (2 * largest.astype(np.float16) / np.float16(2 * INT8_MAX)).astype(np.float16)
    data = steps(weight, scale.astype(np.float32), -INT8_MAX, INT8_MAX)
    return LinearWeight("int8", data, scale)


def stored_int4(weight: np.ndarray) -> LinearWeight:
    """Stores a weight linearly, with a scale per `INT4_BLOCK` input channels, or per output channel."""
    out, inputs = weight.shape[:2]
    count = inputs // INT4_BLOCK if inputs % INT4_BLOCK == 0 else 1
    blocks = weight.reshape(out, count, -1)
    largest = np.abs(blocks).max(2, keepdims=True) / INT4_MAX
    best_scale = largest.astype(np.float16)
    least = np.full(largest.shape, np.inf, np.float32)
    for shrink in INT4_SHRINKS:
        scale = (largest * np.float32(shrink)).astype(np.float16)
        wide = scale.astype(np.float32)
        noise = np.square(steps(blocks, wide, INT4_MIN, INT4_MAX) * wide - blocks).sum(2, keepdims=True)
        best_scale = np.where(noise < least, scale, best_scale)
        least = np.minimum(noise, least)
    data = steps(blocks, best_scale.astype(np.float32), INT4_MIN, INT4_MAX).reshape(weight.shape)
    return LinearWeight("int4", data, best_scale.reshape(out, count, 1, 1))


def stored_palette(scheme: str) -> Callable[[np.ndarray], PaletteWeight]:
    """Returns the function that stores a weight as a palette."""

    def way(weight: np.ndarray) -> PaletteWeight:
        lut, indices = fit_palette(weight, PALETTE_BITS[scheme])
        return PaletteWeight(scheme, indices, lut)

    return way


def with_groups(weight: np.ndarray, stored: StoredWeight) -> StoredWeight:
    """Returns `stored` with a table per group of output channels, if it is a 4-bit palette and groups divide it."""
    if stored.scheme != COARSE_PALETTE or len(weight) % PALETTE_GROUP:
        return stored
    parts = np.split(weight, len(weight) // PALETTE_GROUP)
    tables, indices = zip(*(fit_palette(part, PALETTE_BITS[COARSE_PALETTE]) for part in parts), strict=True)
    return PaletteWeight(COARSE_PALETTE, np.concatenate(indices), np.stack(tables))


def steps(weight: np.ndarray, scale: np.ndarray, least: int, most: int) -> np.ndarray:
    """Returns `weight / scale` rounded and clipped, int8. A scale of 0, from underflow, gives 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = weight / scale
    np.nan_to_num(found, copy=False, posinf=0, neginf=0)
    np.rint(found, out=found)
    return np.clip(found, least, most, out=found).astype(np.int8)


def rounded(values: np.ndarray) -> np.ndarray:
    """Returns float32 values rounded to float16."""
    return values.astype(np.float16).astype(np.float32)


_WAYS: dict[str, Callable[[np.ndarray], StoredWeight]] = {
    "int8": stored_int8,
    "int4": stored_int4,
    **{scheme: stored_palette(scheme) for scheme in PALETTE_BITS},
}


def stored_bytes(shape: tuple[int, ...], scheme: str) -> int:
    """Returns the size of a weight of `shape` in `scheme`."""
    size = prod(shape)
    if scheme in PALETTE_BITS:
        bits = PALETTE_BITS[scheme]
        return (size * bits + 7) // 8 + (2 << bits)
    if scheme == "int8":
        return size + 3 * shape[0]  # with zero points
    if scheme == "int4":
        return size // 2 + 2 * shape[0] * (shape[1] // INT4_BLOCK if shape[1] % INT4_BLOCK == 0 else 1)
    return 2 * size


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

    One value is 0 if the others would drown a row in noise. `weight` is finite and fits float16. A weight has the same
    palette on every machine.
    """
    codes = weight.astype(np.float16).view(np.uint16)
    counts = np.bincount(codes.reshape(-1), minlength=1 << 16)
    order = float16_order()
    order = order[counts[order] > 0]
    values = order.view(np.float16).astype(np.float64)
    lut = kmeans(values, counts[order], 1 << bits).astype(np.float16)
    nearest = np.zeros(1 << 16, np.uint8)
    nearest[order] = cells(values, lut.astype(np.float64))
    if drowns_a_row(weight, lut[nearest[codes]]):
        lut[np.abs(lut).argmin()] = 0
        nearest[order] = cells(values, lut.astype(np.float64))
    return lut, nearest[codes]


def drowns_a_row(weight: np.ndarray, kept: np.ndarray) -> bool:
    """Returns True if the noise of a row has more than `MOST_ROW_NOISE` times the row's power.

    The values of a palette follow the large rows. A row a thousand times smaller gets the value nearest to zero, which
    may be a hundred times too large, and a channel that hardly varies would become one of noise. With a zero among
    the values such a row vanishes, which is what int8 does to it as well.
    """
    rows = weight.reshape(len(weight), -1)
    power = np.einsum("ij,ij->i", rows, rows)
    noise = kept.reshape(rows.shape).astype(np.float32) - rows
    return bool((np.einsum("ij,ij->i", noise, noise) > MOST_ROW_NOISE * power).any())


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
