"""GPTQ (arXiv 2210.17323): rounding column by column, where later columns compensate the error of earlier ones.

The error that counts is that of products with real inputs, not that of weights. With correlated inputs, later columns
can cancel the error of earlier ones. So columns with large inputs come first: groups by their energy, and columns by
theirs within a group. Scales and biases are fitted when a group is reached, with the compensation, and columns with
larger inputs count more in the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.quantization import Affine
from .affine_groups import Packed, fit_groups, packed, rounded

DAMPING = 0.2
"""The damping of the Hessian's diagonal, as a share of its mean.

On inputs that calibration did not have, 0.2 keeps 0.2 to 0.7 dB more than 0.05 (measured with 2,048 and 307 tokens).
"""

TABLE_DAMPING = 1.0
"""The damping for a table that is both embeddings and head.

The products with hidden states then keep 8 dB more than by rounding to nearest, and the rows themselves as much
(measured).
"""

MAX_SPAN = 2048
"""The most columns whose correlations are used. Wider matrices are split into spans.

A Hessian takes memory by the square and time by the cube of its width. A few hundred tokens do not determine more
correlations.
"""

ROWS_AT_ONCE = 8192
"""The rows that are rounded together, which bounds memory. Rows are independent."""

COLUMNS_AT_ONCE = 64
"""The columns whose errors reach later columns in one product, where no groups decide it."""

Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from a column (rows,) to the codes and the values of the nearest levels."""


class Hessian:
    """The products of input columns, summed over tokens, in diagonal blocks of at most `MAX_SPAN` columns."""

    def __init__(self, columns: int, group_size: int) -> None:
        self.group_size = group_size
        self.spans = list(spans(columns, group_size))
        self._sums = [torch.zeros(stop - start, stop - start) for start, stop in self.spans]

    def add(self, inputs: np.ndarray) -> None:
        """Adds inputs (tokens, columns), float32."""
        tokens = torch.from_numpy(inputs)
        for (start, stop), total in zip(self.spans, self._sums, strict=True):
            part = tokens[:, start:stop]
            total.addmm_(part.mT, part)

    def feedback(self, damping: float = DAMPING) -> Feedback:
        """Returns the factors for `gptq`, for all matrices with these inputs."""
        orders, factors, importance = [], [], []
        for total in self._sums:
            order = rounding_order(total.diagonal(), self.group_size)
            damped = _damped(total, damping)[order][:, order]
            orders.append(order)
            factors.append(_factor(damped))
            importance.append(damped.diagonal())
        return Feedback(self.spans, orders, factors, importance)


class Feedback(NamedTuple):
    """The factors by which errors pass from column to column. Columns of a span are in the order of their rounding."""

    spans: list[tuple[int, int]]
    orders: list[Tensor]
    """The places of a span's columns in the order of their rounding."""
    factors: list[Tensor]
    """The upper Cholesky factor of the inverse Hessian per span. Row k has the weights of the columns after k."""
    importance: list[Tensor]
    """The damped energy of each input column per span."""


def spans(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of spans of similar width, each of whole groups."""
    groups = columns // group_size
    count = -(-columns // MAX_SPAN)
    bounds = [group_size * (groups * k // count) for k in range(count + 1)]
    yield from pairwise(bounds)


def rounding_order(energy: Tensor, group_size: int) -> Tensor:
    """Returns the places of columns of this energy, the largest first. Groups stay together."""
    groups = energy.reshape(-1, group_size)
    first = groups.sum(1).argsort(descending=True, stable=True)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    return (first[:, None] * group_size + inside[first]).flatten()


def gptq(weight: np.ndarray, feedback: Feedback, affine: Affine) -> Packed:
    """Quantizes (rows, columns) float32 to `affine` with the feedback of its inputs."""
    parts = [
        _gptq(torch.from_numpy(weight[start : start + ROWS_AT_ONCE]), feedback, affine)
        for start in range(0, len(weight), ROWS_AT_ONCE)
    ]
    return Packed(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def compensated_codes(weight: np.ndarray, feedback: Feedback, nearest: Nearest) -> np.ndarray:
    """Returns the codes (rows, columns) of a float32 weight whose levels are given, with the feedback of its inputs."""
    parts = []
    for (start, stop), order, factor, _ in zip(*feedback, strict=True):
        columns = torch.from_numpy(weight[:, start:stop]).mT[order]
        parts.append(_compensated_span(columns, factor, nearest)[order.argsort()])
    return torch.cat(parts).mT.contiguous().numpy()


def _compensated_span(columns: Tensor, factor: Tensor, nearest: Nearest) -> Tensor:
    """Returns the transposed codes (columns, rows) of a span. Overwrites `columns`."""
    codes = []
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        block = columns[start : start + COLUMNS_AT_ONCE]
        stop, errors = start + len(block), torch.empty_like(block)
        for k, column in enumerate(block):
            at = start + k
            code, value = nearest(column)
            codes.append(code)
            errors[k] = (column - value) / factor[at, at]
            block[k + 1 :].addr_(factor[at, at + 1 : stop], errors[k], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1)
    return torch.stack(codes)


def _gptq(weight: Tensor, feedback: Feedback, affine: Affine) -> Packed:
    parts = [
        _span(weight[:, start:stop].mT, order, factor, importance, affine)
        for (start, stop), order, factor, importance in zip(*feedback, strict=True)
    ]
    codes, scales, biases = (torch.cat(tensors).mT.contiguous() for tensors in zip(*parts, strict=True))
    return packed(codes, scales, biases, affine.bits)


def _span(
    columns: Tensor, order: Tensor, factor: Tensor, importance: Tensor, affine: Affine
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns transposed codes (columns, rows), scales and biases (groups, rows) of a span."""
    columns = columns[order]
    size, codes, scales, biases = affine.group_size, torch.empty_like(columns), [], []
    for start in range(0, len(columns), size):
        group = columns[start : start + size]  # (size, rows)
        fit = fit_groups(group.mT.contiguous(), affine.bits, importance[start : start + size])
        scale, bias = (found[:, 0] for found in fit)
        errors = torch.empty_like(group)
        for k in range(size):
            at = start + k
            codes[at] = rounded(group[k], scale, bias, affine.bits)
            errors[k] = (group[k] - (codes[at] * scale + bias)) / factor[at, at]
            group[k + 1 :].addr_(factor[at, at + 1 : start + size], errors[k], alpha=-1)
        columns[start + size :].addmm_(factor[start : start + size, start + size :].mT, errors, alpha=-1)
        scales.append(scale)
        biases.append(bias)
    groups = (order[::size] // size).argsort()
    return codes[order.argsort()], torch.stack(scales)[groups], torch.stack(biases)[groups]


def _damped(total: Tensor, damping: float) -> Tensor:
    mean = total.diagonal().mean()
    return total + torch.eye(len(total)) * (damping * mean if mean > 0 else 1.0)


def _factor(damped: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
