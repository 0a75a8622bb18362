"""Lowers a `Program` to instructions on slots: constants decoded, dead operations dropped, chains fused.

Limits on memory are checked on the declared shapes before anything is allocated. The executor compares each result
with its declared shape once it is computed. The checks here come first. They compare the declared shapes with each
other wherever a result can be larger than the operands (`Kind.grows`). So nothing grows beyond its declaration, and the
declarations are bounded. Where shapes are open, or parameters are computed, the same check runs before each operation.

Fusion replaces chains of operations that run faster as one. A fused operation never occurs in a saved program. The
intermediate values of a chain are never complete in memory, so fusion is only for runs that neither read nor round
them. With FastViTHD's shapes, two 1x1 convolutions around a GELU take 0.7 to 0.9 of the unfused time, attention a
quarter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PackageError, listed
from .binding import TORCH_TYPES, Growth, Kind, Parameters, Shapes, Step, to_tensor
from .constexpr import Constants
from .ops import KINDS, ROUND_TO_FLOAT16, UNTYPED, WRITE_STATE, dense, rows
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
    is_open: bool = False
    """True if shapes are open, so that `working_bytes` does not count all values."""

    def slot(self, name: str | None = None, content: Tensor | None = None) -> int:
        """Returns the slot of `name`, a new one if it has none. An unnamed constant always gets a new one."""
        if name is not None and name in self.names:
            return self.names[name]
        self.slots.append(content)
        if name is not None:
            self.names[name] = len(self.slots) - 1
        return len(self.slots) - 1


def lower(
    program: Program, outputs: Sequence[str], fuse: bool = False, others: Mapping[str, Kind] | None = None
) -> Plan:
    """Binds every operation that `outputs` depend on, and decodes the weights once.

    Args:
        fuse: True runs chains of operations as one. Set it only if nothing inside a chain is recorded or rounded.
        others: kinds that take the place of those of the same name in `KINDS`, with the same operands.

    Raises:
        PackageError: an operation has an unknown kind or type, or invalid parameters.
    """
    live = _live(program, outputs)
    check_kinds(program, live)
    check_results(program, live)
    if fuse:
        live = fuse_chains(program, live, outputs)
    lowering = _Lowering(program, live, outputs, others or {})
    working_bytes = _working_bytes(program, live, lowering.dying)
    check_memory(program, live, working_bytes)
    for tensor in (*program.inputs, *program.states):
        lowering.plan.slot(tensor.name)
    for index, operation in enumerate(live):
        lowering.bind(index, operation)
    for name in outputs:
        lowering.slot_of(name)
    lowering.plan.working_bytes = working_bytes
    results = [output for operation in live for output in operation.outputs]
    lowering.plan.is_open = not all(tensor.is_fixed for tensor in (*program.inputs, *results))
    return lowering.plan


def _live(program: Program, outputs: Iterable[str]) -> list[Operation]:
    needed, live = set(outputs), []
    for operation in reversed(program.operations):
        is_needed = operation.kind == WRITE_STATE or not needed.isdisjoint(output.name for output in operation.outputs)
        if is_needed and not operation.is_constant:
            needed.update(operation.references)
            live.append(operation)
    return live[::-1]


def _round_trips(live: Sequence[Operation]) -> set[str]:
    """Returns the results of casts to float16 that only other casts read, so that rounding is all they do.

    Other casts to float16 begin a part that computes in float16, which float32 mode computes in float32.
    """
    casts = [operation for operation in live if operation.kind == "cast"]
    computed_on = {name for operation in live if operation.kind != "cast" for name in operation.references}
    cast_again = {name for operation in casts for name in operation.references}
    halves = {output.name for operation in casts for output in operation.outputs if output.dtype == "fp16"}
    return halves & cast_again - computed_on


class _Lowering:
    def __init__(
        self, program: Program, live: Sequence[Operation], outputs: Sequence[str], others: Mapping[str, Kind]
    ) -> None:
        self.plan = Plan()
        self.program, self.types = program, program.types
        self.constants, self.others = Constants(program), others
        self.round_trips = _round_trips(live)
        kinds = [self.kind(operation) for operation in live]
        pairs = list(zip(live, kinds, strict=True))
        aliased = {name for operation, kind in pairs if not kind.fresh for name in operation.references}
        owned = {output.name for operation, kind in pairs if kind.fresh for output in operation.outputs}
        self.private = owned - aliased
        self.dying = self._last_uses(live, outputs)

    def kind(self, operation: Operation) -> Kind:
        """Returns the kind that runs an operation."""
        if not self.round_trips.isdisjoint(output.name for output in operation.outputs):
            return ROUND_TO_FLOAT16
        kinds: tuple[Mapping[str, Kind], ...] = (self.others, KINDS, FUSED_KINDS)
        found = next((table[operation.kind] for table in kinds if operation.kind in table), None)
        if found is None:
            raise _error(operation, "this kind of operation is not supported")
        return found

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
        kind = self.kind(operation)
        _check_types(operation)
        dying = self.dying[index]
        late = _late_arguments(operation, kind, self.constants)
        step = None
        if not late:
            parameters = Parameters(operation, self.constants, self._reusable(operation, dying))
            try:
                step = kind.bind(parameters)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
                raise _error(operation, str(error)) from error
        if step is None or (kind.grows and not _all_fixed(self.program, operation)):
            step = _at_run_time(self.program, operation, kind, late, step)
        arguments = [argument for name in kind.operands for argument in _present(operation, name)]
        operands = tuple(self.slot_of(argument) for argument in (*arguments, *late))
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
        if not operation.outputs:
            return frozenset()
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


def check_kinds(program: Program, live: Sequence[Operation]) -> None:
    """Raises PackageError if there is an operation that cannot be run, and lists all such kinds with their numbers."""
    missing = Counter(operation.kind for operation in live if operation.kind not in KINDS)
    if missing:
        kinds = listed(f"{kind} ({count})" for kind, count in missing.most_common())
        raise PackageError(
            f"{program.path}: {missing.total()} of {len(live)} operations are of kinds that cannot be run: {kinds}. "
            "Run the package with Core ML on a Mac."
        )


def _late_arguments(operation: Operation, kind: Kind, constants: Constants) -> tuple[str, ...]:
    """Returns the parameters that are computed at run time and are not operands of the step."""
    others = [arguments for name, arguments in operation.inputs.items() if name not in kind.operands]
    return tuple(a for arguments in others for a in arguments if isinstance(a, str) and a not in constants)


def _all_fixed(program: Program, operation: Operation) -> bool:
    types = [_type(program, a) for arguments in operation.inputs.values() for a in arguments]
    return all(tensor.is_fixed for tensor in (*types, *operation.outputs))


def _at_run_time(program: Program, operation: Operation, kind: Kind, late: Sequence[str], bound: Step | None) -> Step:
    """Returns a step that checks the size of its result first, and binds computed parameters at every run.

    It takes the values of the operands and then those of `late`. `bound` is the step if nothing is left to bind.
    """
    constants = Constants(program)
    names = [name for name in kind.operands for _ in operation.inputs.get(name, ())]

    def step(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        operands, computed = values[: len(names)], dict(zip(late, values[len(names) :], strict=True))
        p = Parameters(operation, constants, computed=computed)
        if kind.grows:
            shapes: Shapes = {}
            for name, operand in zip(names, operands, strict=True):
                shapes.setdefault(name, []).append(tuple(operand.shape))
            for name, arguments in operation.inputs.items():
                if name not in shapes:
                    known = [computed.get(a) if isinstance(a, str) else None for a in arguments]
                    shapes[name] = [
                        _type(program, a).shape if tensor is None else tuple(tensor.shape)
                        for a, tensor in zip(arguments, known, strict=True)
                    ]
            for shape in kind.grows(p, shapes):
                if 4 * prod(shape) > MAX_BYTES:
                    raise ValueError(f"the result must take at most {MAX_BYTES} bytes, got shape {list(shape)}")
        result: Tensor | tuple[Tensor, ...] = (bound or kind.bind(p))(*operands)
        return result

    return step


def _present(operation: Operation, name: str) -> tuple[Argument, ...]:
    arguments = operation.inputs.get(name, ())
    if not arguments:
        raise _error(operation, f"{name} is missing")
    return arguments


def _check_types(operation: Operation) -> None:
    for output in operation.outputs:
        if output.dtype not in TORCH_TYPES and operation.kind not in UNTYPED:
            raise _error(operation, f"the result must be of type {', '.join(TORCH_TYPES)}, got {output.dtype}")
    if not operation.outputs and operation.kind != WRITE_STATE:
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


MAX_BYTES = 4 * 2**30
"""The limit in bytes for the constants, decoded to float32, and for the values alive at once.

FastViTHD at 1024 px takes 0.5 GB and 0.4 GB, and the weights of a ViT-H 2.5 GB."""


def check_memory(program: Program, live: Sequence[Operation], working_bytes: int) -> None:
    """Raises PackageError if the `live` operations would take absurd memory."""
    used = {name for operation in live for name in operation.references}
    constants = [name for name in used if name in program.producers and program.producers[name].is_constant]
    constant_bytes = sum(4 * program.types[name].elements for name in constants if program.types[name].is_fixed)
    for part, count in (("constants", constant_bytes), ("values", working_bytes)):
        if count > MAX_BYTES:
            raise PackageError(
                f"{program.path}: the {part} must take at most {MAX_BYTES} bytes, got {count}. "
                "The package is damaged, or too large for the executor."
            )


def check_results(program: Program, live: Sequence[Operation]) -> None:
    """Raises PackageError unless the declared results that can grow follow from the declared operands."""
    constants = Constants(program)
    for operation in live:
        kind = KINDS.get(operation.kind)
        if operation.outputs and kind and kind.grows and not _late_arguments(operation, kind, constants):
            _check_result(program, operation, kind.grows, Parameters(operation, constants))


def _check_result(program: Program, operation: Operation, grows: Growth, p: Parameters) -> None:
    if not _all_fixed(program, operation):
        return
    shapes = {name: [_type(program, a).shape for a in arguments] for name, arguments in operation.inputs.items()}
    try:
        expected = grows(p, shapes)
    except (KeyError, IndexError):
        return  # an operand is missing, which binding reports
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _error(operation, str(error)) from error
    declared = operation.outputs[0]
    if expected and declared.shape not in expected:
        raise PackageError(f"{declared.name}: must be {declared}, got shape {list(expected[0])}")


def _type(program: Program, argument: Argument) -> TensorType:
    return argument.type if isinstance(argument, Value) else program.types[argument]


FEED_FORWARD, FEED_FORWARD_ADD, ATTENTION = "fused feed-forward", "fused feed-forward + add", "fused attention"

ROWS_AT_ONCE = 4096
"""The number of positions whose hidden values are computed at a time, so that their memory is reused.

With 96 to 1536 channels, half or twice as many take up to 1.05 of the time, and 512 up to 1.25."""


def _feed_forward(p: Parameters) -> Step:
    up, down = (p.required(f"weight_{i}").flatten(1) for i in (1, 2))  # (hidden, C), (C_out, hidden)
    outputs = len(down)
    widen, narrow = dense(up, p.tensor("bias_1"), gelu=True), dense(down, p.tensor("bias_2"))

    def step(x: Tensor, y: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        source, other = rows(x), None if y is None else rows(y)
        result = torch.empty(len(source), outputs)
        for start in range(0, len(source), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            torch.add(narrow(widen(source[part])), 0 if other is None else other[part], out=result[part])
        return result.view(batch, height, width, -1).permute(0, 3, 1, 2)  # (B, C_out, H, W), channels-last

    return step


def _attention(p: Parameters) -> Step:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (B, heads, N, head_dim) each. Without the copies it is 6 times slower.
        query, key, value = (x.mT.contiguous() for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0).mT

    return step


FUSED_KINDS: dict[str, Kind] = {
    FEED_FORWARD: Kind(("x",), _feed_forward),
    FEED_FORWARD_ADD: Kind(("x", "y"), _feed_forward),
    ATTENTION: Kind(("query", "key", "value"), _attention),
}
"""The fused kinds, by the kind's name."""


PAD_TYPES = ("valid", "custom", "same", "same_lower")
"""The supported values of pad_type. Only `custom` pads a 1x1 kernel with stride 1."""


@dataclass(frozen=True)
class Chain:
    """Operations in which each is the only reader of the one before, with the fused operation's kind and operands."""

    kind: str
    operations: tuple[Operation, ...]
    operands: dict[str, Argument]

    def as_operation(self) -> Operation:
        """Returns the fused operation."""
        last = self.operations[-1]
        return Operation(self.kind, last.name, {name: (a,) for name, a in self.operands.items()}, {}, last.outputs)


def fuse_chains(program: Program, operations: Sequence[Operation], outputs: Collection[str]) -> list[Operation]:
    """Returns `operations` with each chain replaced by one operation at its end. All `outputs` are still computed."""
    finder = _Finder(program, operations, outputs)
    replaced: dict[Operation, Operation | None] = {}
    for operation in operations:
        chain = finder.feed_forward(operation) or finder.attention(operation)
        if chain:
            replaced |= dict.fromkeys(chain.operations)
            replaced[chain.operations[-1]] = chain.as_operation()
    found = [replaced.get(operation, operation) for operation in operations]
    return [operation for operation in found if operation is not None]


class _Finder:
    """Matches chains by their first operation."""

    def __init__(self, program: Program, operations: Sequence[Operation], outputs: Collection[str]) -> None:
        self.types, self.constants, self.outputs = program.types, Constants(program), outputs
        self.uses = Counter(name for operation in operations for name in operation.references)
        self.readers = {name: operation for operation in operations for name in operation.references}

    def feed_forward(self, first: Operation) -> Chain | None:
        """Matches a 1x1 convolution, exact GELU, 1x1 convolution, and an optional addition after it."""
        gelu = self._next(first, "gelu") if self._is_pointwise(first) else None
        second = self._next(gelu, "conv") if gelu and self._parameters(gelu).text("mode", "EXACT") == "EXACT" else None
        if gelu is None or second is None or not self._is_pointwise(second):
            return None
        operands = {"x": first.inputs["x"][0]}
        for number, conv in ((1, first), (2, second)):
            operands |= {
                f"{name}_{number}": conv.inputs[name][0] for name in ("weight", "bias") if conv.inputs.get(name)
            }
        added = self._next(second, "add")
        other = self._other(added, second) if added else None
        if added is None or other is None:
            return Chain(FEED_FORWARD, (first, gelu, second), operands)
        return Chain(FEED_FORWARD_ADD, (first, gelu, second, added), {**operands, "y": other})

    def attention(self, first: Operation) -> Chain | None:
        """Matches attention over (B, heads, head_dim, N): scores, softmax over the keys, and value times the weights.

        The scores are keys by queries, or queries by keys if the last product transposes the weights.
        """
        softmax = self._next(first, "softmax") if self._is_product(first, transposed=(1, 0)) else None
        last = self._next(softmax, "matmul") if softmax else None
        if softmax is None or last is None or last.inputs.get("y") != (softmax.outputs[0].name,):
            return None
        rank = softmax.outputs[0].rank
        axis = self._parameters(softmax).integer("axis", -1) % max(rank, 1)
        if axis == rank - 2 and self._is_product(last, transposed=(0, 0)):
            key, query = "x", "y"
        elif axis == rank - 1 and self._is_product(last, transposed=(0, 1)):
            query, key = "x", "y"
        else:
            return None
        operands = {"query": first.inputs[query][0], "key": first.inputs[key][0], "value": last.inputs["x"][0]}
        return Chain(ATTENTION, (first, softmax, last), operands)

    def _next(self, operation: Operation, kind: str) -> Operation | None:
        """Returns the only reader of the result if it is of `kind` and the result is not an output."""
        results = [output.name for output in operation.outputs]
        if len(results) != 1 or self.uses[results[0]] != 1 or results[0] in self.outputs:
            return None
        reader = self.readers[results[0]]
        return reader if reader.kind == kind else None

    def _is_pointwise(self, operation: Operation) -> bool:
        if operation.kind != "conv" or any(len(operation.inputs.get(name, ())) != 1 for name in ("x", "weight")):
            return False
        if _late_arguments(operation, KINDS["conv"], self.constants):
            return False
        (weight,) = operation.inputs["weight"]
        type = weight.type if isinstance(weight, Value) else self.types[weight]
        given = self._parameters(operation)
        return (
            (isinstance(weight, Value) or weight in self.constants)
            and type.rank == 4
            and type.shape[2:] == (1, 1)
            and set(given.integers("strides", (1, 1))) == {1}
            and given.integer("groups", 1) == 1
            and given.text("pad_type", "valid").lower() in PAD_TYPES
            and not any(given.integers("pad", (0,)))
        )

    def _is_product(self, operation: Operation, transposed: tuple[int, int]) -> bool:
        """Returns True for a product of two computed matrices (B, heads, ., .) with these transpose_x, transpose_y."""
        operands = [a for name in ("x", "y") for a in operation.inputs.get(name, ())]
        if operation.kind != "matmul" or len(operands) != 2:
            return False
        if _late_arguments(operation, KINDS["matmul"], self.constants):
            return False
        given = self._parameters(operation)
        return (given.integer("transpose_x", 0), given.integer("transpose_y", 0)) == transposed and all(
            isinstance(a, str) and a not in self.constants and self.types[a].rank == 4 for a in operands
        )

    def _other(self, added: Operation, second: Operation) -> str | None:
        """Returns the other operand of an addition if it is a computed value of the same shape."""
        (result,) = second.outputs
        for argument in (a for name in ("x", "y") for a in added.inputs.get(name, ())):
            if isinstance(argument, str) and argument != result.name and argument not in self.constants:
                return argument if self.types[argument].shape == result.shape else None
        return None

    def _parameters(self, operation: Operation) -> Parameters:
        return Parameters(operation, self.constants)
