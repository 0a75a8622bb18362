"""Weights in MLX's affine layout with fitted scales and biases: `weight ~ scale * code + bias` in each group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.quantization import Affine

SHRINKS = (1.0, 0.9, 0.8)
"""The shares of a group's range that are tried. Clipping the extremes gains 0.3 dB at 4 bits (measured)."""

REFITS = 1
"""The number of least-squares fits of scale and bias to the codes, each with new codes. One gains 0.3 dB (measured)."""

ROWS_AT_ONCE = 512
"""The rows that are fitted together, which bounds memory."""


class Packed(NamedTuple):
    """A quantized matrix as MLX and safetensors store it."""

    weight: np.ndarray
    """The codes, `bits` each from the lowest bit up, (rows, columns * bits / 32) uint32."""
    scales: np.ndarray
    """(rows, columns / group_size) float16, as `biases`."""
    biases: np.ndarray


def fitted(weight: np.ndarray, affine: Affine) -> Packed:
    """Rounds (rows, columns) float32 to the nearest codes, with scales and biases fitted to each group."""
    parts = [_fitted(torch.from_numpy(rows), affine) for rows in _row_blocks(weight)]
    return Packed(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def fit_groups(groups: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fits scale and bias, (..., 1) each, float16 values in float32, to groups (..., group_size).

    `importance` (group_size,) weighs the squared errors of a group's columns. None weighs them alike.
    """
    shares = torch.ones(groups.shape[-1]) if importance is None else importance
    shares = shares / shares.sum()
    levels = 2**bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS:
        half = (high - low) / 2 * shrink
        scale, bias = half * (2 / levels), (high + low) / 2 - half
        for refit in range(REFITS + 1):
            scale, bias = as_stored(scale), bias.half().float()
            codes = rounded(groups, scale, bias, bits)
            error = ((codes * scale + bias - groups).square() * shares).sum(-1, keepdim=True)
            if best is None:
                best = (error, scale, bias)
            else:
                better = error < best[0]
                found = (error, scale, bias)
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
            if refit < REFITS:
                scale, bias = _least_squares(groups, codes, scale, shares)
    assert best is not None
    return best[1], best[2]


def as_stored(scale: Tensor) -> Tensor:
    """Returns the scale rounded to float16, or 1 where that is 0, so that equal numbers have code 0."""
    scale = scale.half().float()
    return torch.where(scale == 0, 1.0, scale)


def rounded(values: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """Returns the nearest codes as floats."""
    return ((values - bias) / scale).round_().clamp_(0, 2**bits - 1)


def pack(codes: Tensor, bits: int) -> np.ndarray:
    """Packs (rows, columns) codes into (rows, columns * bits / 32) uint32. Eight codes make `bits` bytes."""
    rows = codes.shape[0]
    eights = codes.to(torch.int64).reshape(rows, -1, 8).numpy().astype(np.uint64)
    words = np.zeros(eights.shape[:2], dtype="<u8")
    for place in range(8):
        words |= eights[:, :, place] << np.uint64(place * bits)
    content = words.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits]  # (rows, columns / 8, bits)
    return np.ascontiguousarray(content).reshape(rows, -1).view("<u4")


def _fitted(weight: Tensor, affine: Affine) -> Packed:
    groups = weight.reshape(weight.shape[0], -1, affine.group_size)  # (rows, groups, group_size)
    scale, bias = fit_groups(groups, affine.bits)
    codes = rounded(groups, scale, bias, affine.bits).reshape(weight.shape)
    return packed(codes, scale[..., 0], bias[..., 0], affine.bits)


def packed(codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Packed:
    """Returns codes, scales and biases as they are stored."""
    return Packed(pack(codes, bits), scales.half().numpy(), biases.half().numpy())


def _least_squares(groups: Tensor, codes: Tensor, scale: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Fits scale and bias to these codes by weighted least squares. Where all codes are equal, `scale` stays."""
    mean_code, mean = ((values * shares).sum(-1, keepdim=True) for values in (codes, groups))
    centred = codes - mean_code
    variance = (centred.square() * shares).sum(-1, keepdim=True)
    fit = (centred * groups * shares).sum(-1, keepdim=True) / variance
    scale = torch.where(variance > 0, fit, scale)
    return scale, mean - scale * mean_code


def _row_blocks(weight: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(weight), ROWS_AT_ONCE):
        yield weight[start : start + ROWS_AT_ONCE]
