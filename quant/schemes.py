"""The schemes that store a convolution's weight in fewer bits: rounding, error and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from ..models.errors import UsageError
from .palettes import fit_palette

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

PALETTE_BITS = {"pal8": 8, "pal6": 6, "pal4": 4}
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
    """A weight `lut[indices]`: 2^bits float16 values, and an index of `bits` bits per element."""

    scheme: str
    indices: np.ndarray
    """uint8, in the weight's shape."""
    lut: np.ndarray

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
        return self.lut.astype(np.float32)[self.indices]


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

    Small and depthwise weights stay float16, and so do weights with a low SNR in `scheme`. Folded layer scales can be
    so small that int8's scales, which are float16, underflow.
    """
    if scheme == "fp16" or not is_candidate(weight):
        return None
    stored = store(weight, scheme)
    return stored if weight_snr_db(weight, stored.dense()) > MIN_WEIGHT_SNR_DB[scheme] else None


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
