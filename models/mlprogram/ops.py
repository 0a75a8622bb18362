"""MIL operations on torch: elementwise, shapes, reductions, matrices. Convolutions and pooling are in `ops_spatial`.

Semantics: the MIL operation reference of coremltools 9.0. Each function takes the constant parameters of one operation
and returns the step that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PackageError
from .binding import TORCH_TYPES, Kind, Parameters, Step
from .ops_spatial import SPATIAL_KINDS


def _gelu(p: Parameters) -> Step:
    mode = p.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * torch.sigmoid(1.702 * x)
    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}.get(mode)
    if approximate is None:
        raise PackageError(
            f"{p.operation.name}: gelu mode {mode!r} is not supported; expected EXACT or an approximation"
        )
    if "x" in p.reusable:  # twice as fast at 100 MB: no fresh pages to fault in
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
    return lambda x: torch.softmax(x, axis)


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
        # over the channels of a channels-last tensor the moved axis is the innermost in memory: no copy
        moved = x.movedim(source, last)
        return F.layer_norm(moved, moved.shape[last[0] :], gamma, beta, epsilon).movedim(last, source)

    return step


def _matmul(p: Parameters) -> Step:
    turn_x, turn_y = p.integer("transpose_x", 0), p.integer("transpose_y", 0)
    return lambda x, y: torch.matmul(x.mT if turn_x else x, y.mT if turn_y else y)


def _linear(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")
    return lambda x: F.linear(x, weight, bias)


def _cast(p: Parameters) -> Step:
    dtype = TORCH_TYPES[p.output.dtype]
    return lambda x: x.to(dtype)


def _reshape(p: Parameters) -> Step:
    wanted = p.integers("shape")

    def step(x: Tensor) -> Tensor:
        shift = x.ndim - len(wanted)  # a 0 keeps the size of the axis as far from the end
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
            raise ValueError(f"expected size 1 at axes {chosen}, found {tuple(x.shape)}")
        return x.squeeze(chosen)

    return step


def _split(p: Parameters) -> Step:
    axis, sizes = p.integer("axis"), p.integers("split_sizes", ())
    if sizes:
        return lambda x: x.split(sizes, axis)
    parts = p.integer("num_splits")

    def step(x: Tensor) -> tuple[Tensor, ...]:
        if parts < 1 or x.shape[axis] % parts:
            raise ValueError(f"expected axis {axis} to divide by {parts}, found {tuple(x.shape)}")
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
            raise ValueError(f"expected indices for {x.ndim} axes, found {len(entries)}")
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
    """Broadcast a scalar or a vector along `axis` against `like`."""
    if vector.ndim == 0:
        return vector
    shape: Sequence[int] = [-1 if i == axis % like.ndim else 1 for i in range(like.ndim)]
    return vector.reshape(shape)


def _moves(bind: Callable[[Parameters], Step], operands: tuple[str, ...] = ("x",)) -> Kind:
    return Kind(operands, bind, fresh=False, moves=True)


KINDS: dict[str, Kind] = {
    "add": _commutative(torch.add, torch.Tensor.add_),
    "cast": Kind(("x",), _cast, fresh=False),
    "concat": _moves(_concat, ("values",)),
    "dequantize": Kind(("input",), _dequantize),
    "exp": _elementwise(torch.exp, torch.exp_),
    "expand_dims": _moves(_expand_dims),
    "gelu": Kind(("x",), _gelu),
    "identity": _moves(lambda p: lambda x: x),
    "layer_norm": Kind(("x",), _layer_norm),
    "linear": Kind(("x",), _linear),
    "matmul": Kind(("x", "y"), _matmul),
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
    **SPATIAL_KINDS,
}
"""Every kind that can be run, by its MIL name."""
