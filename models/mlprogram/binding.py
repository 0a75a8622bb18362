"""Binds an operation to a callable: its constant parameters, and the properties of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PackageError
from .constexpr import Constants
from .program import Operation, TensorType

Step = Callable[..., Any]
"""Takes the operands as tensors, in the order of `Kind.operands`, and returns one tensor or one per output."""

TORCH_TYPES = {
    "fp16": torch.float32,  # arithmetic is float32, and the executor rounds results where precision="float16"
    "fp32": torch.float32,
    "bool": torch.bool,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
"""The torch type of a tensor while the program runs, by MIL data type."""


@dataclass(frozen=True)
class Kind:
    """A kind of operation.

    Attributes:
        operands: parameters computed at run time.
        bind: returns the step for one operation.
        fresh: the result never shares memory with an operand, so a later operation may overwrite it.
        moves: values pass unchanged, so there is nothing to round.
    """

    operands: tuple[str, ...]
    bind: Callable[[Parameters], Step]
    fresh: bool = True
    moves: bool = False


class Parameters:
    """The constant parameters of one operation. `reusable` lists operands whose buffer the step may overwrite.

    Raises (every getter):
        PackageError: the parameter is missing or has another form than requested.
    """

    def __init__(self, operation: Operation, constants: Constants, reusable: frozenset[str] = frozenset()) -> None:
        self.operation = operation
        self.reusable = reusable
        self._constants = constants

    @property
    def output(self) -> TensorType:
        """The declared type of the first result."""
        return self.operation.outputs[0]

    def array(self, name: str) -> np.ndarray | None:
        """Returns a constant parameter, or None if the operation does not have it."""
        arguments = self.operation.inputs.get(name, ())
        if not arguments:
            return None
        if len(arguments) > 1:
            raise self._error(f"{name} must be one value, got {len(arguments)}")
        return self._constants.array(arguments[0])

    def tensor(self, name: str) -> Tensor | None:
        """Returns a constant parameter as a contiguous tensor, or None if the operation does not have it."""
        array = self.array(name)
        return None if array is None else to_tensor(array)

    def required(self, name: str) -> Tensor:
        """Returns a constant parameter as a contiguous tensor."""
        tensor = self.tensor(name)
        if tensor is None:
            raise self._error(f"{name} is missing")
        return tensor

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """Returns a vector (or scalar) of integers or booleans."""
        array = self.array(name)
        if array is None and default is not None:
            return tuple(default)
        if array is None or array.dtype.kind not in "iub":
            raise self._error(f"{name} must be integers, got {'nothing' if array is None else array.dtype}")
        return tuple(int(value) for value in array.reshape(-1))

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns one integer or boolean."""
        values = self.integers(name, None if default is None else (default,))
        if len(values) != 1:
            raise self._error(f"{name} must be one integer, got {len(values)}")
        return values[0]

    def number(self, name: str, default: float) -> float:
        """Returns a scalar as a float."""
        array = self.array(name)
        return default if array is None else float(array.item())

    def text(self, name: str, default: str) -> str:
        """Returns a string."""
        array = self.array(name)
        return default if array is None else str(array.item())

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.operation.name} ({self.operation.kind}): {problem}")


def to_tensor(array: np.ndarray) -> Tensor:
    """Copies a constant into a tensor. float16 and float32 become float32, other types stay.

    Raises:
        PackageError: the constant is not numeric.
    """
    if array.dtype.kind not in "biuf":
        raise PackageError(f"a constant must be numeric, got {array.dtype}")
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype.kind == "f" else None, order="C"))
