"""MIL operations on torch: elementwise, reductions, matrices, shapes, quantization, convolution and pooling.

Semantics follow the MIL operation reference of coremltools 9.0. Each function takes the constant parameters of one
operation and returns the step that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PackageError
from .binding import TORCH_TYPES, Kind, Parameters, Step

Dense = Callable[[Tensor], Tensor]
"""(N, in) -> (N, out), float32."""

PACKED_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise")
"""oneDNN's products with packed weights, which torch's own compiler emits. Builds without oneDNN lack them."""

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_AVG_POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


def _gelu(p: Parameters) -> Step:
    mode = p.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * torch.sigmoid(1.702 * x)
    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}.get(mode)
    if approximate is None:
        raise PackageError(
            f"{p.operation.name}: mode must be EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION, got {mode!r}"
        )
    if "x" in p.reusable:  # twice as fast at 100 MB, because no new pages are faulted in
        return lambda x: torch.ops.aten.gelu_(x, approximate=approximate)
    return lambda x: F.gelu(x, approximate=approximate)


def _elementwise(function: Callable[[Tensor], Tensor], in_place: Callable[[Tensor], Tensor]) -> Kind:
    return Kind(("x",), lambda p: in_place if "x" in p.reusable else function)


def _commutative(function: Step, in_place: Step) -> Kind:
    def bind(p: Parameters) -> Step:
        if "x" in p.reusable:
            return in_place
        return (lambda x, y: in_place(y, x)) if "y" in p.reusable else function

    return Kind(("x", "y"), bind)


def _binary(function: Step) -> Kind:
    return Kind(("x", "y"), lambda p: function)


def _rsqrt(p: Parameters) -> Step:
    epsilon = p.number("epsilon", 1e-12)
    return lambda x: torch.rsqrt(x + epsilon)


def _softmax(p: Parameters) -> Step:
    axis = p.integer("axis", -1)

    def over_rows(x: Tensor) -> Tensor:
        # over another axis than the last, torch's own takes 1.35 times as long (24 heads of 1024 x 1024)
        if not x.numel():
            return torch.softmax(x, axis)
        weights = (x - x.amax(axis, keepdim=True)).exp_()
        return weights.div_(weights.sum(axis, keepdim=True))

    over_last = axis in (-1, p.output.rank - 1)
    return (lambda x: torch.softmax(x, axis)) if over_last else over_rows


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Kind:
    def bind(p: Parameters) -> Step:
        axes, keep = p.integers("axes", ()), bool(p.integer("keep_dims", 0))
        return lambda x: function(x, axes or tuple(range(x.ndim)), keep)

    return Kind(("x",), bind)


def _layer_norm(p: Parameters) -> Step:
    axes, epsilon = p.integers("axes", ()), p.number("epsilon", 1e-5)
    gamma, beta = p.tensor("gamma"), p.tensor("beta")

    def step(x: Tensor) -> Tensor:
        source = sorted(axis % x.ndim for axis in axes) or list(range(x.ndim))
        last = list(range(x.ndim - len(source), x.ndim))
        # No copy for a channels-last tensor: the channel axis is already the innermost in memory.
        moved = x.movedim(source, last)
        return F.layer_norm(moved, moved.shape[last[0] :], gamma, beta, epsilon).movedim(last, source)

    return step


def _matmul(p: Parameters) -> Step:
    transpose_x, transpose_y = p.integer("transpose_x", 0), p.integer("transpose_y", 0)
    return lambda x, y: torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def _linear(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    return lambda x: F.linear(x, weight, bias)


def _cast(p: Parameters) -> Step:
    dtype = TORCH_TYPES[p.output.dtype]
    return lambda x: x.to(dtype)


def _reshape(p: Parameters) -> Step:
    wanted = p.integers("shape")

    def step(x: Tensor) -> Tensor:
        shift = x.ndim - len(wanted)  # a 0 keeps the size of the axis at the same distance from the end
        shape = [size or (x.shape[i + shift] if i + shift >= 0 else 1) for i, size in enumerate(wanted)]
        return x.reshape(shape)

    return step


def _transpose(p: Parameters) -> Step:
    axes = p.integers("perm")
    return lambda x: x.permute(axes)


def _expand_dims(p: Parameters) -> Step:
    axes = p.integers("axes")

    def step(x: Tensor) -> Tensor:
        rank = x.ndim + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return step


def _squeeze(p: Parameters) -> Step:
    axes = p.integers("axes", ())

    def step(x: Tensor) -> Tensor:
        chosen = axes or tuple(axis for axis, size in enumerate(x.shape) if size == 1)
        if any(x.shape[axis] != 1 for axis in chosen):
            raise ValueError(f"axes {chosen} must have size 1, got shape {tuple(x.shape)}")
        return x.squeeze(chosen)

    return step


def _split(p: Parameters) -> Step:
    axis, sizes = p.integer("axis"), p.integers("split_sizes", ())
    if sizes:
        return lambda x: x.split(sizes, axis)
    parts = p.integer("num_splits")

    def step(x: Tensor) -> tuple[Tensor, ...]:
        if parts < 1 or x.shape[axis] % parts:
            raise ValueError(f"axis {axis} must be divisible by {parts}, got shape {tuple(x.shape)}")
        return x.split(x.shape[axis] // parts, axis)

    return step


def _concat(p: Parameters) -> Step:
    axis = p.integer("axis")
    if not p.integer("interleave", 0):
        return lambda *values: torch.cat(values, axis)

    def interleave(*values: Tensor) -> Tensor:
        start = axis % values[0].ndim
        return torch.stack(values, start + 1).flatten(start, start + 1)

    return interleave


def _slice_by_index(p: Parameters) -> Step:
    begin, end = p.integers("begin"), p.integers("end")
    flags = [p.integers(name, [0] * len(begin)) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    entries = list(zip(begin, end, p.integers("stride", [1] * len(begin)), *flags, strict=True))

    def step(x: Tensor) -> Tensor:
        if len(entries) != x.ndim:
            raise ValueError(f"must have indices for {x.ndim} axes, got {len(entries)}")
        for axis, (first, last, stride, from_start, to_end, drop) in enumerate(entries):
            if drop:
                x = x.narrow(axis, first % x.shape[axis], 1)
                continue
            chosen = slice(None if from_start else first, None if to_end else last, stride)
            x = _take(x, axis, range(*chosen.indices(x.shape[axis])))
        return x.squeeze([axis for axis, entry in enumerate(entries) if entry[5]])

    return step


def _take(x: Tensor, axis: int, indices: range) -> Tensor:
    if indices.step > 0:
        return x[(slice(None),) * axis + (slice(indices.start, indices.stop, indices.step),)]
    return x.index_select(axis, torch.tensor(indices, dtype=torch.long))


def _quantize(p: Parameters) -> Step:
    scale, zero_point, axis = p.required("scale"), p.tensor("zero_point"), p.integer("axis", 0)
    dtype = TORCH_TYPES[p.output.dtype]
    limits = torch.iinfo(dtype)

    def step(input: Tensor) -> Tensor:
        scaled = torch.round(input / _along(scale, axis, input))
        if zero_point is not None:
            scaled += _along(zero_point, axis, input)
        return scaled.clamp_(limits.min, limits.max).to(dtype)

    return step


def _dequantize(p: Parameters) -> Step:
    scale, zero_point, axis = p.required("scale"), p.tensor("zero_point"), p.integer("axis", 0)

    def step(input: Tensor) -> Tensor:
        shifted = input.to(torch.float32)
        if zero_point is not None:
            shifted = shifted - _along(zero_point, axis, input)
        return shifted * _along(scale, axis, input)

    return step


def _along(vector: Tensor, axis: int, like: Tensor) -> Tensor:
    """Broadcasts a scalar or a vector along `axis` against `like`."""
    if vector.ndim == 0:
        return vector
    shape: Sequence[int] = [-1 if i == axis % like.ndim else 1 for i in range(like.ndim)]
    return vector.reshape(shape)


class _Padding:
    """The padding of a convolution or pool: zeros (or `fill`) before and after each spatial axis."""

    def __init__(self, p: Parameters, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> None:
        self.kind = p.text("pad_type", "valid").lower()
        self.spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        self.strides = strides
        axes = len(kernel)
        if self.kind not in ("valid", "custom", "same", "same_lower"):
            raise PackageError(
                f"{p.operation.name}: pad_type must be valid, custom, same or same_lower, got {self.kind!r}"
            )
        self.custom = p.integers("pad", [0] * 2 * axes) if self.kind == "custom" else (0,) * 2 * axes
        if len(self.custom) != 2 * axes:
            raise PackageError(f"{p.operation.name}: must have {2 * axes} paddings, got {len(self.custom)}")

    @property
    def is_none(self) -> bool:
        """True if a 1x1 kernel with stride 1 needs no padding. `same` adds none to it either."""
        return not any(self.custom)

    def amounts(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Returns (before, after) per spatial axis for an input of spatial `shape`."""
        if self.kind in ("valid", "custom"):
            return list(zip(self.custom[::2], self.custom[1::2], strict=True))
        return [self._same(*axis) for axis in zip(shape, self.spans, self.strides, strict=True)]

    def _same(self, size: int, span: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + span - size)  # the output has ceil(size / stride)
        less, more = total // 2, total - total // 2
        return (more, less) if self.kind == "same_lower" else (less, more)

    def split(self, x: Tensor, fill: float = 0.0, limits: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Returns `x` and the padding that torch can apply itself. Any other padding is applied to `x` here.

        torch pads both ends equally, and a pool by at most `limits` per axis.
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
        raise PackageError(f"{p.operation.name}: weight must have rank 3 to 5, got {weight.ndim}")
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
    """Runs a 1x1 convolution as one matrix product. oneDNN's convolution would repack the weight on every call."""
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


def dense(weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Dense:
    """Returns a function for x @ weight.T + bias with `weight` (out, in), and exact GELU of that if `gelu`.

    The weight is packed once for all runs. With FastViTHD's weights two products around a GELU take 0.8 of the time
    of torch's public operations.
    """
    if _packs():
        return _packed(weight, bias, gelu)
    return _public(weight, bias, gelu)


def _packs() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in PACKED_OPERATIONS)


def _packed(weight: Tensor, bias: Tensor | None, gelu: bool) -> Dense:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product, then = torch.ops.mkldnn._linear_pointwise, "gelu" if gelu else "none"
    return lambda x: product(x, packed, bias, then, [], "none")  # the last "none" selects the exact GELU


def _public(weight: Tensor, bias: Tensor | None, gelu: bool) -> Dense:
    if gelu:
        return lambda x: torch.ops.aten.gelu_(F.linear(x, weight, bias))
    return lambda x: F.linear(x, weight, bias)


def rows(x: Tensor) -> Tensor:
    """Reshapes (B, C, H, W) to (BHW, C), a view if the tensor is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _moves(bind: Callable[[Parameters], Step], operands: tuple[str, ...] = ("x",)) -> Kind:
    return Kind(operands, bind, fresh=False, moves=True)


KINDS: dict[str, Kind] = {
    "add": _commutative(torch.add, torch.Tensor.add_),
    "avg_pool": Kind(("x",), _avg_pool),
    "batch_norm": Kind(("x",), _batch_norm),
    "cast": Kind(("x",), _cast, fresh=False),
    "concat": _moves(_concat, ("values",)),
    "conv": Kind(("x",), _conv),
    "dequantize": Kind(("input",), _dequantize),
    "exp": _elementwise(torch.exp, torch.exp_),
    "expand_dims": _moves(_expand_dims),
    "gelu": Kind(("x",), _gelu),
    "identity": _moves(lambda p: lambda x: x),
    "layer_norm": Kind(("x",), _layer_norm),
    "linear": Kind(("x",), _linear),
    "matmul": Kind(("x", "y"), _matmul),
    "max_pool": Kind(("x",), _max_pool),
    "mul": _commutative(torch.mul, torch.Tensor.mul_),
    "pow": _binary(torch.pow),
    "quantize": Kind(("input",), _quantize),
    "real_div": _binary(torch.div),
    "reduce_max": _reduction(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "reduce_sum": _reduction(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "relu": _elementwise(torch.relu, torch.relu_),
    "reshape": _moves(_reshape),
    "rsqrt": Kind(("x",), _rsqrt),
    "sigmoid": _elementwise(torch.sigmoid, torch.sigmoid_),
    "silu": _elementwise(F.silu, lambda x: F.silu(x, inplace=True)),
    "slice_by_index": _moves(_slice_by_index),
    "softmax": Kind(("x",), _softmax),
    "split": _moves(_split),
    "sqrt": _elementwise(torch.sqrt, torch.sqrt_),
    "square": _elementwise(torch.square, torch.square_),
    "squeeze": _moves(_squeeze),
    "sub": _binary(torch.sub),
    "tanh": _elementwise(torch.tanh, torch.tanh_),
    "transpose": _moves(_transpose),
}
"""The kinds that can be run, by MIL name."""
