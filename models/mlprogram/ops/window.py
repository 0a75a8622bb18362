"""Operations over windows of the spatial axes: convolutions, transposed convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackageError
from ..binding import Kind, Parameters, Shape, Shapes, Step
from .matrix import dense, rows

MAX_PADDED = 2**29
"""The largest padded operand of a convolution or pool in elements, 2 GiB of float32."""

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_AVG_POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}

Pads = list[tuple[int, int]]
"""(before, after) for each spatial axis."""


class _Windows:
    """The windows of a convolution or pool: kernel, strides, dilations, padding, and how their number is rounded."""

    def __init__(self, p: Parameters, kernel: Sequence[int]) -> None:
        axes = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = p.integers("strides", [1] * axes)
        self.dilations = p.integers("dilations", [1] * axes)
        self.ceil = bool(p.integer("ceil_mode", 0))
        self.kind = p.text("pad_type", "valid").lower()
        if self.kind not in ("valid", "custom", "same", "same_lower"):
            raise PackageError(
                f"{p.operation.name}: pad_type must be valid, custom, same or same_lower, got {self.kind!r}"
            )
        self.custom = p.integers("pad", [0] * 2 * axes) if self.kind == "custom" else (0,) * 2 * axes
        if len(self.custom) != 2 * axes:
            raise PackageError(f"{p.operation.name}: must have {2 * axes} paddings, got {len(self.custom)}")
        if not len(self.strides) == len(self.dilations) == axes or min((*self.strides, *self.dilations), default=1) < 1:
            raise PackageError(
                f"{p.operation.name}: must have {axes} strides and dilations above 0, got {[*self.strides]} "
                f"and {[*self.dilations]}"
            )
        if min(self.custom, default=0) < 0:
            raise PackageError(f"{p.operation.name}: paddings must be 0 or more, got {list(self.custom)}")
        self.spans = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]

    @property
    def is_unpadded(self) -> bool:
        """True if a 1x1 kernel with stride 1 needs no padding. `same` adds none to it either."""
        return not any(self.custom)

    def amounts(self, grid: Sequence[int]) -> Pads:
        """Returns the padding of an input of spatial shape `grid`."""
        if self.kind in ("valid", "custom"):
            return list(zip(self.custom[::2], self.custom[1::2], strict=True))
        return [self._same(*axis) for axis in zip(grid, self.spans, self.strides, strict=True)]

    def _same(self, size: int, span: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + span - size)  # the output has ceil(size / stride)
        less, more = total // 2, total - total // 2
        return (more, less) if self.kind == "same_lower" else (less, more)

    def grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Returns the number of windows per axis, as coremltools' `spatial_dimensions_out_shape` counts them.

        In ceil mode a partial last window counts, unless the axis is padded and the window starts in the second half
        of the padding.
        """
        return tuple(
            self._count(*axis) for axis in zip(grid, self.amounts(grid), self.spans, self.strides, strict=True)
        )

    def _count(self, size: int, pads: tuple[int, int], span: int, stride: int) -> int:
        room = size + sum(pads) - span
        if not self.ceil:
            return room // stride + 1
        count = -(-room // stride) + 1
        return count - 1 if any(pads) and (count - 1) * stride >= size + sum(pads) / 2 else count

    def missing(self, grid: Sequence[int]) -> Pads:
        """Returns the positions after the padded input that a partial last window still covers, as padding."""
        extents = zip(grid, self.amounts(grid), self.grid(grid), self.spans, self.strides, strict=True)
        return [(0, max(0, (n - 1) * stride + span - size - sum(pads))) for size, pads, n, span, stride in extents]

    def split(self, x: Tensor, fill: float = 0.0, limits: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Returns `x` and the padding that torch can apply itself. Any other padding is applied to `x` here.

        torch pads both ends equally, and a pool by at most `limits` per axis.
        """
        amounts = self.amounts(x.shape[2:])
        before = [first for first, _ in amounts]
        allowed = limits is None or all(size <= limit for size, limit in zip(before, limits, strict=True))
        if allowed and all(first == last for first, last in amounts):
            return x, before
        return _pad(x, amounts, fill), [0] * len(amounts)

    def shapes(self, batch: int, channels: int, grid: Sequence[int]) -> list[Shape]:
        """Returns the shape of the result. Raises ValueError if the padded operand is absurd."""
        padded = prod(size + sum(pads) for size, pads in zip(grid, self.amounts(grid), strict=True))
        if padded * batch * channels > MAX_PADDED:
            raise ValueError(f"the padded input must have at most {MAX_PADDED} elements, got paddings {self.custom}")
        return [(batch, channels, *self.grid(grid))]


def _pad(x: Tensor, amounts: Pads, fill: float = 0.0) -> Tensor:
    return F.pad(x, [amount for pair in reversed(amounts) for amount in pair], value=fill)


def _conv(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    if weight.ndim not in _CONV:
        raise PackageError(f"{p.operation.name}: weight must have rank 3 to 5, got {weight.ndim}")
    windows, groups = _Windows(p, weight.shape[2:]), p.integer("groups", 1)
    strides, dilations = windows.strides, windows.dilations
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv = _CONV[weight.ndim]
    if weight.ndim == 4 and weight.shape[2:] == (1, 1) and groups == 1 and set(strides) == {1} and windows.is_unpadded:
        return _pointwise(weight.flatten(1), bias)

    def step(x: Tensor) -> Tensor:
        x, pad = windows.split(x)
        return conv(x, weight, bias, strides, pad, dilations, groups)

    return step


def _pointwise(weight: Tensor, bias: Tensor | None) -> Step:
    """Runs a 1x1 convolution as one matrix product. oneDNN's convolution would repack the weight on every call."""
    product = dense(weight, bias)

    def step(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return product(rows(x)).view(batch, height, width, -1).permute(0, 3, 1, 2)  # (B, C_out, H, W), channels-last

    return step


def _conv_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    (batch, channels, *grid), (out, _, *kernel) = shapes["x"][0], shapes["weight"][0]
    windows = _Windows(p, kernel)
    windows.shapes(batch, channels, grid)
    return [(batch, out, *windows.grid(grid))]


def _conv_transpose(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    if weight.ndim not in _CONV_TRANSPOSE:
        raise PackageError(f"{p.operation.name}: weight must have rank 3 to 5, got {weight.ndim}")
    windows, groups = _Windows(p, weight.shape[2:]), p.integer("groups", 1)
    conv = _CONV_TRANSPOSE[weight.ndim]

    def step(x: Tensor) -> Tensor:
        sizes = _transposed_grid(p, windows, x.shape[2:])
        whole = conv(x, weight, None, windows.strides, 0, 0, groups, windows.dilations)
        cut = []
        for size, full, (before, _) in zip(sizes, whole.shape[2:], _transposed_pads(windows, x.shape[2:]), strict=True):
            cut.append((-before, size + before - full))  # an end beyond the sum is zero, but for the bias
        whole = _pad(whole, cut) if any(any(pair) for pair in cut) else whole
        return whole if bias is None else whole + bias.reshape(1, -1, *[1] * (whole.ndim - 2))

    return step


def _transposed_pads(windows: _Windows, grid: Sequence[int]) -> Pads:
    """Returns the number of sums to drop before and after each axis of a transposed convolution."""
    if windows.kind in ("valid", "custom"):
        return windows.amounts(grid)
    pads = []
    for span, stride in zip(windows.spans, windows.strides, strict=True):
        total = max(0, span - stride)
        less, more = total // 2, total - total // 2
        pads.append((more, less) if windows.kind == "same_lower" else (less, more))
    return pads


def _transposed_grid(p: Parameters, windows: _Windows, grid: Sequence[int]) -> tuple[int, ...]:
    given = p.integers("output_shape", ())
    if given:
        return given[2:]
    if windows.kind.startswith("same"):
        return tuple(size * stride for size, stride in zip(grid, windows.strides, strict=True))
    axes = zip(grid, windows.strides, windows.spans, windows.amounts(grid), strict=True)
    return tuple((size - 1) * stride + span - sum(pads) for size, stride, span, pads in axes)


def _conv_transpose_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    (batch, _, *grid), (_, channels, *kernel) = shapes["x"][0], shapes["weight"][0]
    windows, out = _Windows(p, kernel), channels * p.integer("groups", 1)
    whole = [
        (size - 1) * stride + span for size, stride, span in zip(grid, windows.strides, windows.spans, strict=True)
    ]
    if batch * out * prod(whole) > MAX_PADDED:
        raise ValueError(f"the result must have at most {MAX_PADDED} elements, got {[batch, out, *whole]}")
    return [(batch, out, *_transposed_grid(p, windows, grid))]


def _pool_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    batch, channels, *grid = shapes["x"][0]
    return _Windows(p, p.integers("kernel_sizes")).shapes(batch, channels, grid)


def _avg_pool(p: Parameters) -> Step:
    windows = _Windows(p, p.integers("kernel_sizes"))
    exclude = bool(p.integer("exclude_padding_from_average", 0))
    pool = _AVG_POOL[len(windows.kernel) + 2]

    def step(x: Tensor) -> Tensor:
        grid = x.shape[2:]
        missing = windows.missing(grid) if windows.ceil else []
        padded, pad = windows.split(x, limits=[size // 2 for size in windows.kernel])
        if padded is x and not any(after for _, after in missing):
            return pool(x, windows.kernel, windows.strides, pad, False, not exclude)
        # the average of the values over the average of a mask of what counts
        counts = _pad(torch.ones_like(x[:1, :1]), windows.amounts(grid), 0.0 if exclude else 1.0)
        values = _pad(x, windows.amounts(grid))
        if missing:
            counts, values = _pad(counts, missing), _pad(values, missing)
        return pool(values, windows.kernel, windows.strides) / pool(counts, windows.kernel, windows.strides)

    return step


def _max_pool(p: Parameters) -> Step:
    windows = _Windows(p, p.integers("kernel_sizes"))
    pool = _MAX_POOL[len(windows.kernel) + 2]

    def step(x: Tensor) -> Tensor:
        missing = windows.missing(x.shape[2:]) if windows.ceil else []
        padded, pad = windows.split(x, fill=float("-inf"), limits=[size // 2 for size in windows.kernel])
        if any(after for _, after in missing):
            padded, pad = _pad(x, windows.amounts(x.shape[2:]), float("-inf")), [0] * len(pad)
            padded = _pad(padded, missing, float("-inf"))
        return pool(padded, windows.kernel, windows.strides, pad)

    return step


def _l2_pool(p: Parameters) -> Step:
    """Returns the root of the sum of squares of each window."""
    windows = _Windows(p, p.integers("kernel_sizes"))
    pool = _AVG_POOL[len(windows.kernel) + 2]

    def step(x: Tensor) -> Tensor:
        squares = _pad(_pad(x.square(), windows.amounts(x.shape[2:])), windows.missing(x.shape[2:]))
        return (pool(squares, windows.kernel, windows.strides) * prod(windows.kernel)).sqrt()

    return step


WINDOWS: dict[str, Kind] = {
    "avg_pool": Kind(("x",), _avg_pool, grows=_pool_shape),
    "conv": Kind(("x",), _conv, grows=_conv_shape),
    "conv_transpose": Kind(("x",), _conv_transpose, grows=_conv_transpose_shape),
    "l2_pool": Kind(("x",), _l2_pool, grows=_pool_shape),
    "max_pool": Kind(("x",), _max_pool, grows=_pool_shape),
}
"""The kinds over windows, by MIL name."""
