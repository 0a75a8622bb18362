"""Fusion: chains of operations that run faster as one, and the operations in their place.

A fused operation never occurs in a saved program. A chain's intermediate values are never complete in memory, so
fusion is only for runs that neither read nor round them.

With FastViTHD's shapes, two 1x1 convolutions around a GELU take 0.7 to 0.9 of the unfused time, attention a quarter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .binding import Kind, Parameters, Step
from .constexpr import Constants
from .ops import dense, rows
from .program import Argument, Operation, Program, Value

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
