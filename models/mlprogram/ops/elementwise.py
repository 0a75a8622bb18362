"""Operations on each element alone: unary and binary functions, comparisons, activations, casts and quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PackageError
from ..binding import TORCH_TYPES, Kind, Parameters, Shape, Shapes, Step, broadcast

Function = Callable[[Tensor], Tensor]

_GELU_LINEAR = 1e30
"""The value above which GELU is taken as the identity, which it is in float32 from about 6. torch's kernels
overflow near the largest float."""


def _gelu(p: Parameters) -> Step:
    mode = p.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * torch.sigmoid(1.702 * x)
    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}.get(mode)
    if approximate is None:
        raise PackageError(
            f"{p.operation.name}: mode must be EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION, got {mode!r}"
        )

    def step(x: Tensor) -> Tensor:
        if "x" in p.reusable:  # twice as fast at 100 MB, because no new pages are faulted in
            return torch.ops.aten.gelu_(x, approximate=approximate)
        return F.gelu(x, approximate=approximate)

    def guarded(x: Tensor) -> Tensor:
        if x.numel() and float(x.amax()) > _GELU_LINEAR:
            return torch.where(x > _GELU_LINEAR, x, F.gelu(x.clamp(max=_GELU_LINEAR), approximate=approximate))
        return step(x)

    return guarded if p.output.dtype == "fp32" else step  # no float16 is that large


def _unary(function: Function, in_place: Function | None = None) -> Kind:
    return Kind(("x",), lambda p: in_place if in_place and "x" in p.reusable else function)


def _commutative(function: Step, in_place: Step) -> Kind:
    def bind(p: Parameters) -> Step:
        if "x" in p.reusable:
            return in_place
        return (lambda x, y: in_place(y, x)) if "y" in p.reusable else function

    return Kind(("x", "y"), bind, grows=broadcast("x", "y"))


def _binary(function: Step) -> Kind:
    return Kind(("x", "y"), lambda p: function, grows=broadcast("x", "y"))


def _pow(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.pow(x, y)
    return torch.pow(x.to(torch.float64), y)  # torch refuses integers to negative powers


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y) if x.dtype.is_floating_point else torch.div(x.to(torch.float64), y)


def _with_epsilon(function: Function, default: float) -> Kind:
    def bind(p: Parameters) -> Step:
        epsilon = p.number("epsilon", default)
        return lambda x: function(x + epsilon)

    return Kind(("x",), bind)


def _alpha_beta(function: Callable[[Tensor, float, float], Tensor]) -> Kind:
    """An activation with one or two scalar parameters."""

    def bind(p: Parameters) -> Step:
        alpha, beta = p.number("alpha", 1.0), p.number("beta", 0.0)
        return lambda x: function(x, alpha, beta)

    return Kind(("x",), bind)


def _clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(0, beta) + (x.clamp(max=0) * alpha).clamp(max=beta)


def _per_channel(p: Parameters, name: str, x: Tensor) -> Tensor:
    """Returns a vector parameter, one value per channel of `x`, shaped to broadcast against it."""
    vector = p.required(name).reshape(-1)
    if x.ndim < 2 or len(vector) != x.shape[1]:
        raise ValueError(f"{name} must have one value per channel of {list(x.shape)}, got {len(vector)}")
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def _prelu(p: Parameters) -> Step:
    return lambda x: x.clamp(min=0) + x.clamp(max=0) * _per_channel(p, "alpha", x)


def _softplus_parametric(p: Parameters) -> Step:
    return lambda x: _per_channel(p, "alpha", x) * F.softplus(x * _per_channel(p, "beta", x))


def _clip(p: Parameters) -> Step:
    low, high = p.number("alpha", float("-inf")), p.number("beta", float("inf"))
    return lambda x: x.clamp(min=low).clamp(max=high)


def _threshold(p: Parameters) -> Step:
    low = p.number("alpha", 0.0)
    return lambda x: x.clamp(min=low if x.dtype.is_floating_point else int(low))


def _cast(p: Parameters) -> Step:
    target = p.output.dtype
    dtype = TORCH_TYPES[target]
    if target == "uint16":
        return lambda x: x.to(torch.int64).bitwise_and_(0xFFFF).to(dtype)
    return lambda x: x.to(dtype)


ROUND_TO_FLOAT16 = Kind(("x",), lambda p: lambda x: x.to(torch.float16).to(torch.float32))
"""A cast to float16 that is there for its rounding: casts alone read its result."""


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


def _scaled_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    data = shapes["input"][0]
    for name in ("scale", "zero_point"):
        for shape in shapes.get(name, ()):
            if shape and shape != (data[p.integer("axis", 0)],):
                raise ValueError(f"{name} must be a scalar or one value along the axis, got {list(shape)}")
    return [data]


ELEMENTWISE: dict[str, Kind] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "add": _commutative(torch.add, torch.Tensor.add_),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "cast": Kind(("x",), _cast, fresh=False),
    "ceil": _unary(torch.ceil),
    "clamped_relu": _alpha_beta(_clamped_relu),
    "clip": Kind(("x",), _clip),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "dequantize": Kind(("input",), _dequantize, grows=_scaled_shape),
    "elu": _alpha_beta(lambda x, alpha, beta: F.elu(x, alpha)),
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp, torch.exp_),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "floor_div": _binary(torch.floor_divide),
    "gelu": Kind(("x",), _gelu),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "inverse": _with_epsilon(torch.reciprocal, 1e-4),
    "leaky_relu": _alpha_beta(lambda x, alpha, beta: F.leaky_relu(x, alpha)),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear_activation": _alpha_beta(lambda x, alpha, beta: x * alpha + beta),
    "log": _with_epsilon(torch.log, 1e-45),
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _commutative(torch.mul, torch.Tensor.mul_),
    "not_equal": _binary(torch.ne),
    "pow": _binary(_pow),
    "prelu": Kind(("x",), _prelu),
    "quantize": Kind(("input",), _quantize, grows=_scaled_shape),
    "real_div": _binary(_real_div),
    "relu": _unary(torch.relu, torch.relu_),
    "relu6": _unary(F.relu6),
    "round": _unary(torch.round),
    "rsqrt": _with_epsilon(torch.rsqrt, 1e-12),
    "scaled_tanh": _alpha_beta(lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "select": Kind(("cond", "a", "b"), lambda p: torch.where, grows=broadcast("cond", "a", "b")),
    "sigmoid": _unary(torch.sigmoid, torch.sigmoid_),
    "sigmoid_hard": _alpha_beta(lambda x, alpha, beta: (x * alpha + beta).clamp_(0, 1)),
    "sign": _unary(torch.sign),
    "silu": _unary(F.silu, lambda x: F.silu(x, inplace=True)),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "softplus": _unary(F.softplus),
    "softplus_parametric": Kind(("x",), _softplus_parametric),
    "softsign": _unary(F.softsign),
    "sqrt": _unary(torch.sqrt, torch.sqrt_),
    "square": _unary(torch.square, torch.square_),
    "sub": _binary(torch.sub),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh, torch.tanh_),
    "threshold": Kind(("x",), _threshold),
    "thresholded_relu": _alpha_beta(lambda x, alpha, beta: torch.where(x < alpha, 0.0, x)),
}
"""The elementwise kinds, by MIL name."""
