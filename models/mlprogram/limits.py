"""What a program may ask for: checked on its declared shapes, before anything of that size is allocated.

Each result is compared with its declared shape when it is there. Here, before, the declared shapes are compared with
each other wherever an operation could make more than it was given: then nothing grows beyond what is declared, and what
is declared is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import PackageError
from .binding import Parameters
from .constexpr import Constants
from .program import Argument, Operation, Program, TensorType, Value

MAX_BYTES = 2 * 2**30
"""Of the constants, decoded to float32, and of the values alive at once. FastViTHD at 1024 px: 0.5 and 0.4 GB."""

SMALL_PADDING = 16
"""Always allowed, even where the kernel is smaller."""

Shape = tuple[int, ...]


def check_memory(program: Program, live: Sequence[Operation], working_bytes: int) -> None:
    """Raises PackageError when running `live` would take absurd memory, or its shapes are left open."""
    for operation in live:
        for output in operation.outputs:
            if not output.is_fixed and all(tensor.is_fixed for tensor in program.inputs):
                raise PackageError(f"{output.name}: expected a fixed shape, found {output}; export the model again")
    used = {name for operation in live for name in operation.references}
    constants = [name for name in used if name in program.producers and program.producers[name].is_constant]
    constant_bytes = sum(4 * program.types[name].elements for name in constants if program.types[name].is_fixed)
    for what, count in (("constants", constant_bytes), ("values", working_bytes)):
        if count > MAX_BYTES:
            raise PackageError(
                f"{program.path}: its {what} take {count} bytes, where {MAX_BYTES} are the most; it is no FastVLM "
                "encoder, or damaged: export the model again"
            )


def check_results(program: Program, live: Sequence[Operation]) -> None:
    """Raises PackageError unless the declared results are what the declared operands make, where they could grow."""
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
        return  # an operand is missing: binding says which
    except (ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise PackageError(f"{operation.name} ({operation.kind}): {reason}; export the model again") from error
    if expected and declared.shape not in expected:
        raise PackageError(
            f"{declared.name}: expected {declared}, found shape {list(expected[0])}; export the model again"
        )


def _type(program: Program, argument: Argument) -> TensorType:
    return argument.type if isinstance(argument, Value) else program.types[argument]


Shapes = dict[str, list[Shape]]


def _broadcast(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [np.broadcast_shapes(shapes["x"][0], shapes["y"][0])]


def _matmul(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, y = shapes["x"][0], shapes["y"][0]
    if len(x) < 2 or len(y) < 2:
        return [p.output.shape]  # a vector: the result is smaller than the operands
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
                raise ValueError(f"expected a scalar or one value along the axis for {name}, found {list(shape)}")
    return [data]


def _conv(p: Parameters, shapes: Shapes) -> list[Shape]:
    (batch, _, *grid), (channels, _, *kernel) = shapes["x"][0], shapes["weight"][0]
    return [(batch, channels, *sizes) for sizes in _grids(p, grid, kernel)]


def _pool(p: Parameters, shapes: Shapes) -> list[Shape]:
    batch, channels, *grid = shapes["x"][0]
    return [(batch, channels, *sizes) for sizes in _grids(p, grid, p.integers("kernel_sizes"))]


def _grids(p: Parameters, grid: Sequence[int], kernel: Sequence[int]) -> list[Shape]:
    """Output grids: with the last window whole, and with it cut off (`ceil_mode`); none where binding will refuse."""
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
        raise ValueError(f"expected paddings up to the kernel's spans {spans}, found {list(pad)}")
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
