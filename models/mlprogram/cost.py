"""What an operation costs: arithmetic, and the values that it reads and writes."""

from __future__ import annotations

from math import prod

from .program import Operation, Program, TensorType

COSTLY = ("conv", "linear", "matmul")
"""Kinds that do nearly all the arithmetic; what stands between them is fused into them, or small."""


def flops(program: Program, operation: Operation) -> int:
    """Floating-point operations of a convolution, matrix product or linear layer; 0 for others, which are small.

    A multiplication and an addition count as two.
    """
    if operation.kind in ("conv", "linear"):
        return 2 * operation.outputs[0].elements * prod(_operand(program, operation, "weight").shape[1:])
    if operation.kind == "matmul":
        x = _operand(program, operation, "x").shape
        transposed = operation.values.get("transpose_x")
        if transposed is None and "transpose_x" in operation.inputs:
            name = operation.inputs["transpose_x"][0]
            assert isinstance(name, str)
            transposed = program.producers[name].values["val"]
        inner = x[-2] if transposed is not None and bool(transposed.array()) else x[-1]
        return 2 * operation.outputs[0].elements * inner
    return 0


def moved_elements(program: Program, operation: Operation) -> int:
    """Values that such an operation reads and writes, without its weights; 0 for others."""
    if operation.kind not in COSTLY:
        return 0
    read = [_operand(program, operation, name) for name in ("x", "y") if name in operation.inputs]
    return sum(tensor.elements for tensor in (*read, operation.outputs[0]))


def _operand(program: Program, operation: Operation, name: str) -> TensorType:
    argument = operation.inputs[name][0]
    return program.types[argument] if isinstance(argument, str) else argument.type
