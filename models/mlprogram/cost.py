"""The cost of an operation: floating-point operations, and the elements that it reads and writes."""

from __future__ import annotations

from math import prod

from ..errors import PackageError
from .constexpr import Constants
from .program import Operation, Program, TensorType

COSTLY = ("conv", "linear", "matmul")
"""The kinds with nearly all the arithmetic. Operations between them are fused into them, or small."""


def flops(program: Program, operation: Operation) -> int:
    """Returns the floating-point operations of a convolution, matrix product or linear layer, and 0 for other kinds.

    A multiplication and an addition count as two. Other kinds are small.

    Raises:
        PackageError: an operand or the result is missing.
    """
    if operation.kind in ("conv", "linear"):
        return 2 * _result(operation).elements * prod(_operand(program, operation, "weight").shape[1:])
    if operation.kind == "matmul":
        x = _operand(program, operation, "x").shape
        summed = x[-2:-1] if _is_transposed(program, operation) else x[-1:]
        return 2 * _result(operation).elements * prod(summed)
    return 0


def moved_elements(program: Program, operation: Operation) -> int:
    """Returns the elements that a `COSTLY` operation reads and writes, without its weights, and 0 for other kinds.

    Raises:
        PackageError: an operand or the result is missing.
    """
    if operation.kind not in COSTLY:
        return 0
    read = [_operand(program, operation, name) for name in ("x", "y") if name in operation.inputs]
    return sum(tensor.elements for tensor in (*read, _result(operation)))


def _is_transposed(program: Program, operation: Operation) -> bool:
    """Returns True if the first operand of a matrix product is transposed."""
    given = operation.values.get("transpose_x")
    arguments = operation.inputs.get("transpose_x", ()) if given is None else (given,)
    flags = [Constants(program).array(argument) for argument in arguments]
    return any(flag.dtype.kind in "biu" and flag.any() for flag in flags)


def _operand(program: Program, operation: Operation, name: str) -> TensorType:
    arguments = operation.inputs.get(name, ())
    if not arguments:
        raise PackageError(f"{operation.name} ({operation.kind}): {name} is missing")
    return program.types[arguments[0]] if isinstance(arguments[0], str) else arguments[0].type


def _result(operation: Operation) -> TensorType:
    if not operation.outputs:
        raise PackageError(f"{operation.name} ({operation.kind}): it has no result")
    return operation.outputs[0]
