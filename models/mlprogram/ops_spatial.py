"""MIL operations over a spatial grid on torch: convolution, pooling, batch norm. Grids have one to three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PackageError
from .binding import Kind, Parameters, Step
from .dense import dense, rows

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_AVG_POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


class _Padding:
    """`pad_type` and `pad` of a convolution or pool: zeros (or `fill`) before and after each spatial axis."""

    def __init__(self, p: Parameters, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> None:
        self.kind = p.text("pad_type", "valid").lower()
        self.spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        self.strides = strides
        axes = len(kernel)
        if self.kind not in ("valid", "custom", "same", "same_lower"):
            raise PackageError(
                f"{p.operation.name}: pad_type {self.kind!r} is not supported; expected valid, custom or same"
            )
        self.custom = p.integers("pad", [0] * 2 * axes) if self.kind == "custom" else (0,) * 2 * axes
        if len(self.custom) != 2 * axes:
            raise PackageError(f"{p.operation.name}: expected {2 * axes} paddings, found {len(self.custom)}")

    @property
    def is_none(self) -> bool:
        """Whether a 1x1 kernel that does not stride needs none: `same` then pads nothing either."""
        return not any(self.custom)

    def amounts(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return (before, after) per spatial axis for an input of spatial `shape`."""
        if self.kind in ("valid", "custom"):
            return list(zip(self.custom[::2], self.custom[1::2], strict=True))
        return [self._same(*axis) for axis in zip(shape, self.spans, self.strides, strict=True)]

    def _same(self, size: int, span: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + span - size)  # the output has ceil(size / stride)
        less, more = total // 2, total - total // 2
        return (more, less) if self.kind == "same_lower" else (less, more)

    def split(self, x: Tensor, fill: float = 0.0, limits: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Return `x` and the padding torch can apply itself; padding it cannot is applied to `x` here.

        torch pads both ends alike, and pools at most `limits` per axis.
        """
        amounts = self.amounts(x.shape[2:])
        before = [first for first, _ in amounts]
        allowed = limits is None or all(size <= limit for size, limit in zip(before, limits, strict=True))
        if allowed and all(first == last for first, last in amounts):
            return x, before
        flat = [amount for pair in reversed(amounts) for amount in pair]
        return F.pad(x, flat, value=fill), [0] * len(amounts)


def _conv(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    axes = weight.ndim - 2
    if weight.ndim not in _CONV:
        raise PackageError(f"{p.operation.name}: expected a weight of rank 3 to 5, found {weight.ndim}")
    strides, dilations = p.integers("strides", [1] * axes), p.integers("dilations", [1] * axes)
    groups = p.integer("groups", 1)
    padding = _Padding(p, weight.shape[2:], strides, dilations)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv = _CONV[weight.ndim]
    if weight.ndim == 4 and weight.shape[2:] == (1, 1) and groups == 1 and set(strides) == {1} and padding.is_none:
        return _pointwise(weight.flatten(1), bias)

    def step(x: Tensor) -> Tensor:
        x, pad = padding.split(x)
        return conv(x, weight, bias, strides, pad, dilations, groups)

    return step


def _pointwise(weight: Tensor, bias: Tensor | None) -> Step:
    """A 1x1 convolution as one matrix product over all positions: oneDNN would rearrange the weight on every call."""
    product = dense(weight, bias)

    def step(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return product(rows(x)).view(batch, height, width, -1).permute(0, 3, 1, 2)  # (B, C_out, H, W), channels-last

    return step


def _pool_parameters(p: Parameters) -> tuple[tuple[int, ...], tuple[int, ...], _Padding, bool]:
    kernel = p.integers("kernel_sizes")
    strides = p.integers("strides", [1] * len(kernel))
    padding = _Padding(p, kernel, strides, [1] * len(kernel))
    return kernel, strides, padding, bool(p.integer("ceil_mode", 0))


def _avg_pool(p: Parameters) -> Step:
    kernel, strides, padding, ceil = _pool_parameters(p)
    exclude = bool(p.integer("exclude_padding_from_average", 0))
    pool = _AVG_POOL[len(kernel) + 2]

    def step(x: Tensor) -> Tensor:
        padded, pad = padding.split(x, limits=[size // 2 for size in kernel])
        if padded is x or not exclude:
            return pool(padded, kernel, strides, pad, ceil, not exclude)
        counted, _ = padding.split(torch.ones_like(x), limits=[0] * len(kernel))
        return pool(padded, kernel, strides) / pool(counted, kernel, strides)

    return step


def _max_pool(p: Parameters) -> Step:
    kernel, strides, padding, ceil = _pool_parameters(p)
    pool = _MAX_POOL[len(kernel) + 2]

    def step(x: Tensor) -> Tensor:
        padded, pad = padding.split(x, fill=float("-inf"), limits=[size // 2 for size in kernel])
        return pool(padded, kernel, strides, pad, 1, ceil)

    return step


def _batch_norm(p: Parameters) -> Step:
    mean, variance = p.required("mean"), p.required("variance")
    gamma, beta, epsilon = p.tensor("gamma"), p.tensor("beta"), p.number("epsilon", 1e-5)
    return lambda x: F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


SPATIAL_KINDS: dict[str, Kind] = {
    "avg_pool": Kind(("x",), _avg_pool),
    "batch_norm": Kind(("x",), _batch_norm),
    "conv": Kind(("x",), _conv),
    "max_pool": Kind(("x",), _max_pool),
}
