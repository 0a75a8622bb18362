"""Limits on memory, checked on a program's declared shapes before anything is allocated.

The executor compares each result with its declared shape once it is computed. These checks come first. They compare
the declared shapes with each other wherever a result can be larger than the operands. So nothing grows beyond its
declaration, and the declarations are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import PackageError
from .binding import Parameters
from .constexpr import Constants
from .program import Argument, Operation, Program, Shape, TensorType, Value

MAX_BYTES = 2 * 2**30
"""The limit in bytes for the constants, decoded to float32, and for the values alive at once.

FastViTHD at 1024 px takes 0.5 GB and 0.4 GB."""

SMALL_PADDING = 16
"""The padding in elements that is always allowed, even with a smaller kernel."""

Shapes = dict[str, list[Shape]]
"""The shapes of an operation's operands, by parameter."""


def check_memory(program: Program, live: Sequence[Operation], working_bytes: int) -> None:
    """Raises PackageError if the `live` operations would take absurd memory or leave their shapes open."""
    for operation in live:
        for output in operation.outputs:
            if not output.is_fixed and all(tensor.is_fixed for tensor in program.inputs):
                raise PackageError(f"{output.name}: must have a fixed shape, got {output}")
    used = {name for operation in live for name in operation.references}
    constants = [name for name in used if name in program.producers and program.producers[name].is_constant]
    constant_bytes = sum(4 * program.types[name].elements for name in constants if program.types[name].is_fixed)
    for part, count in (("constants", constant_bytes), ("values", working_bytes)):
        if count > MAX_BYTES:
            raise PackageError(
                f"{program.path}: the {part} must take at most {MAX_BYTES} bytes, got {count}. "
                "The package is damaged or not a FastVLM encoder."
            )


def check_results(program: Program, live: Sequence[Operation]) -> None:
    """Raises PackageError unless the declared results that can grow follow from the declared operands."""
    constants = Constants(program)
    for operation in live:
        if operation.outputs:
            _check_result(program, operation, Parameters(operation, constants))


def _check_result(program: Program, operation: Operation, p: Parameters) -> None:
    expected_shape = _EXPECTED.get(operation.kind)
    types = {name: [_type(program, argument) for argument in arguments] for name, arguments in operation.inputs.items()}
    declared = operation.outputs[0]
    if expected_shape is None or not all(t.is_fixed for group in types.values() for t in [*group, declared]):
        return
    try:
        expected = expected_shape(p, {name: [t.shape for t in group] for name, group in types.items()})
    except (KeyError, IndexError):
        return  # an operand is missing, which binding reports
    except (ValueError, ZeroDivisionError) as error:
        raise PackageError(f"{operation.name} ({operation.kind}): {str(error).splitlines()[0]}") from error
    if expected and declared.shape not in expected:
        raise PackageError(f"{declared.name}: must be {declared}, got shape {list(expected[0])}")


def _type(program: Program, argument: Argument) -> TensorType:
    return argument.type if isinstance(argument, Value) else program.types[argument]


def _broadcast(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [np.broadcast_shapes(shapes["x"][0], shapes["y"][0])]


def _matmul(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, y = shapes["x"][0], shapes["y"][0]
    if len(x) < 2 or len(y) < 2:
        return [p.output.shape]  # the result of a vector is smaller than the operands
    rows = x[-1] if p.integer("transpose_x", 0) else x[-2]
    columns = y[-2] if p.integer("transpose_y", 0) else y[-1]
    return [(*np.broadcast_shapes(x[:-2], y[:-2]), rows, columns)]


def _linear(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [(*shapes["x"][0][:-1], shapes["weight"][0][0])]


def _concat(p: Parameters, shapes: Shapes) -> list[Shape]:
    values, axis = shapes["values"], p.integer("axis")
    joined = list(values[0])
    joined[axis] = sum(shape[axis] for shape in values)
    return [tuple(joined)]


def _scaled(p: Parameters, shapes: Shapes) -> list[Shape]:
    data = shapes["input"][0]
    for name in ("scale", "zero_point"):
        for shape in shapes.get(name, ()):
            if shape and shape != (data[p.integer("axis", 0)],):
                raise ValueError(f"{name} must be a scalar or one value along the axis, got {list(shape)}")
    return [data]


def _conv(p: Parameters, shapes: Shapes) -> list[Shape]:
    (batch, _, *grid), (channels, _, *kernel) = shapes["x"][0], shapes["weight"][0]
    return [(batch, channels, *sizes) for sizes in _grids(p, grid, kernel)]


def _pool(p: Parameters, shapes: Shapes) -> list[Shape]:
    batch, channels, *grid = shapes["x"][0]
    return [(batch, channels, *sizes) for sizes in _grids(p, grid, p.integers("kernel_sizes"))]


def _grids(p: Parameters, grid: Sequence[int], kernel: Sequence[int]) -> list[Shape]:
    """Returns the output grids without and with a partial last window (`ceil_mode`), or none if binding will fail."""
    axes = len(kernel)
    strides, dilations = p.integers("strides", [1] * axes), p.integers("dilations", [1] * axes)
    kind = p.text("pad_type", "valid").lower()
    if kind.startswith("same"):
        return [tuple(-(-size // stride) for size, stride in zip(grid, strides, strict=True))]
    pad = p.integers("pad", [0] * 2 * axes) if kind == "custom" else (0,) * 2 * axes
    if not axes == len(grid) == len(strides) == len(dilations) == len(pad) / 2 or kind not in ("valid", "custom"):
        return []
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    if any(
        amount < 0 or amount > max(span, SMALL_PADDING) for amount, span in zip(pad, np.repeat(spans, 2), strict=True)
    ):
        raise ValueError(f"paddings must be at most the kernel's spans {spans}, got {list(pad)}")
    room = [
        size + before + after - span for size, before, after, span in zip(grid, pad[::2], pad[1::2], spans, strict=True)
    ]
    whole = tuple(left // stride + 1 for left, stride in zip(room, strides, strict=True))
    cut = tuple(-(-left // stride) + 1 for left, stride in zip(room, strides, strict=True))
    return [whole, cut]


_EXPECTED: dict[str, Callable[[Parameters, Shapes], list[Shape]]] = {
    "add": _broadcast,
    "avg_pool": _pool,
    "concat": _concat,
    "conv": _conv,
    "dequantize": _scaled,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _pool,
    "mul": _broadcast,
    "pow": _broadcast,
    "quantize": _scaled,
    "real_div": _broadcast,
    "sub": _broadcast,
}
