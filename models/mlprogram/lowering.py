"""Lowers a `Program` to instructions on slots: constants decoded, dead operations dropped, lifetimes known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import PackageError
from .binding import TORCH_TYPES, Kind, Parameters, Step, to_tensor
from .constexpr import Constants
from .fusion import fuse_chains
from .limits import check_memory, check_results
from .ops import KINDS
from .ops_fused import FUSED_KINDS
from .program import Argument, Operation, Program, TensorType, Value


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
