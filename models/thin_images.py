"""Pillow's bicubic resize of rows, for a picture that is a thin stripe of a large black square.

Pillow would read the black too: for 1 x 60000 pixels, 3.6 billion of it. Black adds nothing to a sum, so that only the
stripe's own columns count. The arithmetic is Pillow's (`src/libImaging/Resample.c`): coefficients in float64, rounded
to 22 bits; the sums of integers are exact in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISION_BITS = 22
SUPPORT = 2.0
"""Of the bicubic kernel, in output pixels to each side."""


def resize_stripe_rows(stripe: NDArray[np.uint8], left: int, side: int, size: int) -> NDArray[np.uint8]:
    """(H, size, 3): rows of `side` pixels, black but for `stripe` (H, W, 3) from column `left` on, made `size` long."""
    height, width = stripe.shape[:2]
    columns, weights = _weights(left, width, side, size)
    rows = stripe.transpose(0, 2, 1).reshape(-1, width).astype(np.float64)  # (H * 3, W)
    sums = np.floor((rows @ weights + 2.0 ** (PRECISION_BITS - 1)) / 2.0**PRECISION_BITS)
    resized = np.zeros((height, size, 3), np.uint8)
    made = np.clip(sums, 0, 255).astype(np.uint8).reshape(height, 3, -1)  # (H, 3, columns)
    resized[:, columns] = made.transpose(0, 2, 1)
    return resized


def _weights(left: int, width: int, side: int, size: int) -> tuple[slice, NDArray[np.float64]]:
    """The output columns that see the stripe, and what each of its columns (W) adds to them, as integers."""
    scale = side / size
    support = SUPPORT * max(scale, 1.0)
    first = max(0, int((left - support) / scale) - 1)
    last = min(size, int((left + width + support) / scale) + 2)
    weights = np.zeros((width, last - first))
    for column in range(first, last):
        begin, taps = _coefficients(column, scale, side)
        start, stop = max(begin, left), min(begin + len(taps), left + width)
        if start < stop:
            weights[start - left : stop - left, column - first] = taps[start - begin : stop - begin]
    return slice(first, last), weights


def _coefficients(column: int, scale: float, side: int) -> tuple[int, NDArray[np.float64]]:
    """The first input pixel of an output pixel, and the weights of it and of those that follow."""
    filter_scale = max(scale, 1.0)
    center, support = (column + 0.5) * scale, SUPPORT * filter_scale
    begin, end = max(0, int(center - support + 0.5)), min(side, int(center + support + 0.5))
    x = np.abs((np.arange(end - begin) + begin - center + 0.5) * (1.0 / filter_scale))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= np.cumsum(weights)[-1]  # summed one by one, as there
    scaled = weights * 2.0**PRECISION_BITS
    return begin, np.trunc(np.where(weights < 0, scaled - 0.5, scaled + 0.5))
