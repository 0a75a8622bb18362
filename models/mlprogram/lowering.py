"""Lowers a `Program` to instructions on slots: constants decoded, dead operations dropped, lifetimes known.

Limits on memory are checked on the declared shapes before anything is allocated. The executor compares each result
with its declared shape once it is computed. The checks here come first. They compare the declared shapes with each
other wherever a result can be larger than the operands. So nothing grows beyond its declaration, and the declarations
are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..errors import PackageError
from .binding import TORCH_TYPES, Kind, Parameters, Step, to_tensor
from .constexpr import Constants
from .fusion import FUSED_KINDS, fuse_chains
from .ops import KINDS
from .program import Argument, Operation, Program, Shape, TensorType, Value


@dataclass(frozen=True, eq=False)
class Instruction:
    """One operation, ready to run: `step(*values[operands])` gives `outputs`, and then `release` may be freed."""

    operation: Operation
    kind: Kind
    step: Step
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    release: tuple[int, ...]


@dataclass(eq=False)
class Plan:
    """The lowered program. `slots` is the state before a run: constants in place, None elsewhere."""

    slots: list[Tensor | None] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    working_bytes: int = 0
    """The peak of the bytes of computed values alive at once. Views count as copies."""

    def slot(self, name: str | None = None, content: Tensor | None = None) -> int:
        """Returns the slot of `name`, a new one if it has none. An unnamed constant always gets a new one."""
        if name is not None and name in self.names:
            return self.names[name]
        self.slots.append(content)
        if name is not None:
            self.names[name] = len(self.slots) - 1
        return len(self.slots) - 1


def lower(program: Program, outputs: Sequence[str], fuse: bool = False) -> Plan:
    """Binds every operation that `outputs` depend on, and decodes the weights once.

    `fuse` runs chains of operations as one. Set it only if nothing inside a chain is recorded or rounded.

    Raises:
        PackageError: an operation has an unknown kind or type, or invalid parameters.
    """
    live = _live(program, outputs)
    check_results(program, live)
    if fuse:
        live = fuse_chains(program, live, outputs)
    lowering = _Lowering(program, live, outputs)
    working_bytes = _working_bytes(program, live, lowering.dying)
    check_memory(program, live, working_bytes)
    for tensor in program.inputs:
        lowering.plan.slot(tensor.name)
    for index, operation in enumerate(live):
        lowering.bind(index, operation)
    for name in outputs:
        lowering.slot_of(name)
    lowering.plan.working_bytes = working_bytes
    return lowering.plan


def _live(program: Program, outputs: Iterable[str]) -> list[Operation]:
    needed, live = set(outputs), []
    for operation in reversed(program.operations):
        if not operation.is_constant and not needed.isdisjoint(output.name for output in operation.outputs):
            needed.update(operation.references)
            live.append(operation)
    return live[::-1]


class _Lowering:
    def __init__(self, program: Program, live: Sequence[Operation], outputs: Sequence[str]) -> None:
        self.plan = Plan()
        self.types = program.types
        self.constants = Constants(program)
        kinds = [_kind(operation) for operation in live]
        pairs = list(zip(live, kinds, strict=True))
        aliased = {name for operation, kind in pairs if not kind.fresh for name in operation.references}
        owned = {output.name for operation, kind in pairs if kind.fresh for output in operation.outputs}
        self.private = owned - aliased
        self.dying = self._last_uses(live, outputs)

    def _last_uses(self, live: Sequence[Operation], outputs: Sequence[str]) -> list[list[str]]:
        """Returns the names that nothing needs after each operation."""
        last: dict[str, int] = {}
        for index, operation in enumerate(live):
            computed = (*operation.references, *(output.name for output in operation.outputs))
            last.update((name, index) for name in computed if name not in self.constants)
        dying: list[list[str]] = [[] for _ in live]
        for name, index in last.items():
            if name not in outputs:
                dying[index].append(name)
        return dying

    def bind(self, index: int, operation: Operation) -> None:
        """Appends the instruction of the operation at `index`."""
        kind = _kind(operation)
        _check_types(operation)
        dying = self.dying[index]
        parameters = Parameters(operation, self.constants, self._reusable(operation, dying))
        try:
            step = kind.bind(parameters)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            raise _error(operation, str(error)) from error
        operands = tuple(self.slot_of(argument) for name in kind.operands for argument in _present(operation, name))
        outputs = tuple(self.plan.slot(output.name) for output in operation.outputs)
        release = tuple(self.plan.names[name] for name in dying if name in self.plan.names)
        self.plan.instructions.append(Instruction(operation, kind, step, operands, outputs, release))

    def slot_of(self, argument: Argument) -> int:
        """Returns the slot of an operand, and decodes a constant on its first use."""
        if isinstance(argument, Value):
            return self.plan.slot(content=to_tensor(argument.array()))
        if argument in self.constants and argument not in self.plan.names:
            return self.plan.slot(argument, to_tensor(self.constants.array(argument)))
        return self.plan.slot(argument)

    def _reusable(self, operation: Operation, dying: Sequence[str]) -> frozenset[str]:
        """Returns the operands whose buffer is private, no longer needed, and fits the result."""
        result = operation.outputs[0]
        return frozenset(
            key
            for key, arguments in operation.inputs.items()
            for name in arguments
            if isinstance(name, str)
            and name in self.private
            and name in dying
            and self.types[name].is_fixed
            and (self.types[name].dtype, self.types[name].shape) == (result.dtype, result.shape)
        )


def _kind(operation: Operation) -> Kind:
    kind = KINDS.get(operation.kind) or FUSED_KINDS.get(operation.kind)
    if kind is None:
        raise PackageError(
            f"{operation.name}: operation {operation.kind!r} is not supported (the executor has "
            f"{', '.join(sorted(KINDS))}). Run this package with Core ML on a Mac."
        )
    return kind


def _present(operation: Operation, name: str) -> tuple[Argument, ...]:
    arguments = operation.inputs.get(name, ())
    if not arguments:
        raise _error(operation, f"{name} is missing")
    return arguments


def _check_types(operation: Operation) -> None:
    for output in operation.outputs:
        if output.dtype not in TORCH_TYPES:
            raise _error(operation, f"the result must be of type {', '.join(TORCH_TYPES)}, got {output.dtype}")
    if not operation.outputs:
        raise _error(operation, "it has no result")


def _working_bytes(program: Program, live: Sequence[Operation], dying: Sequence[Sequence[str]]) -> int:
    alive = sum(_run_bytes(tensor) for tensor in program.inputs)
    peak = alive
    for operation, names in zip(live, dying, strict=True):
        alive += sum(_run_bytes(output) for output in operation.outputs)
        peak = max(peak, alive)
        alive -= sum(_run_bytes(program.types[name]) for name in names)
    return peak


def _run_bytes(tensor: TensorType) -> int:
    dtype = TORCH_TYPES.get(tensor.dtype)
    return tensor.elements * dtype.itemsize if dtype is not None and tensor.is_fixed else 0


def _error(operation: Operation, problem: str) -> PackageError:
    line = problem.strip().splitlines()[0] if problem.strip() else "failed"
    return PackageError(f"{operation.name} ({operation.kind}): {line}")


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
