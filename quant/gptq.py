"""GPTQ (arXiv 2210.17323): rounding column by column, where later columns compensate the error of earlier ones.

The error that counts is that of products with real inputs, not that of weights. With correlated inputs, later columns
can cancel the error of earlier ones. Scales and biases are fitted when a group is reached, with the compensation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.quantization import Affine
from .affine_groups import Packed, fit_groups, packed, rounded

DAMPING = 0.05
"""The damping of the Hessian's diagonal, as a share of its mean. 0.01 to 0.1 give similar errors (measured)."""

MAX_SPAN = 2048
"""The most columns whose correlations are used. Wider matrices are split into spans.

A Hessian takes memory by the square and time by the cube of its width. A few hundred tokens do not determine more
correlations.
"""

ROWS_AT_ONCE = 8192
"""The rows that are rounded together, which bounds memory. Rows are independent."""


class Hessian:
    """The products of input columns, summed over tokens, in diagonal blocks of at most `MAX_SPAN` columns."""

    def __init__(self, columns: int, group_size: int) -> None:
        self.spans = list(spans(columns, group_size))
        self._sums = [torch.zeros(stop - start, stop - start) for start, stop in self.spans]

    def add(self, inputs: np.ndarray) -> None:
        """Adds inputs (tokens, columns), float32."""
        tokens = torch.from_numpy(inputs)
        for (start, stop), total in zip(self.spans, self._sums, strict=True):
            part = tokens[:, start:stop]
            total.addmm_(part.mT, part)

    def feedback(self) -> Feedback:
        """Returns the factors for `gptq`, for all matrices with these inputs."""
        return Feedback(self.spans, [_feedback(total) for total in self._sums])


class Feedback(NamedTuple):
    """The factors by which errors pass from column to column."""

    spans: list[tuple[int, int]]
    factors: list[Tensor]
    """The upper Cholesky factor of the inverse Hessian per span. Row k has the weights of the columns after k."""


def spans(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of spans of similar width, each of whole groups."""
    groups = columns // group_size
    count = -(-columns // MAX_SPAN)
    bounds = [group_size * (groups * k // count) for k in range(count + 1)]
    yield from pairwise(bounds)


def gptq(weight: np.ndarray, feedback: Feedback, affine: Affine) -> Packed:
    """Quantizes (rows, columns) float32 to `affine` with the feedback of its inputs."""
    parts = [
        _gptq(torch.from_numpy(weight[start : start + ROWS_AT_ONCE]), feedback, affine)
        for start in range(0, len(weight), ROWS_AT_ONCE)
    ]
    return Packed(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _gptq(weight: Tensor, feedback: Feedback, affine: Affine) -> Packed:
    parts = [
        _span(weight[:, start:stop].mT.clone(memory_format=torch.contiguous_format), factor, affine)
        for (start, stop), factor in zip(*feedback, strict=True)
    ]
    codes, scales, biases = (torch.cat(tensors).mT.contiguous() for tensors in zip(*parts, strict=True))
    return packed(codes, scales, biases, affine.bits)


def _span(columns: Tensor, factor: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Returns transposed codes (columns, rows), scales and biases (groups, rows) of a span. Overwrites `columns`."""
    size, codes, scales, biases = affine.group_size, torch.empty_like(columns), [], []
    for start in range(0, len(columns), size):
        group = columns[start : start + size]  # (size, rows)
        scale, bias = (found[:, 0] for found in fit_groups(group.mT.contiguous(), affine.bits))
        errors = torch.empty_like(group)
        for k in range(size):
            at = start + k
            codes[at] = rounded(group[k], scale, bias, affine.bits)
            errors[k] = (group[k] - (codes[at] * scale + bias)) / factor[at, at]
            group[k + 1 :].addr_(factor[at, at + 1 : start + size], errors[k], alpha=-1)
        columns[start + size :].addmm_(factor[start : start + size, start + size :].mT, errors, alpha=-1)
        scales.append(scale)
        biases.append(bias)
    return codes, torch.stack(scales), torch.stack(biases)


def _feedback(total: Tensor) -> Tensor:
    mean = total.diagonal().mean()
    damped = total + torch.eye(len(total)) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
