"""How an operation becomes a callable: its constant parameters, and what the table of operations says about a kind."""

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
"""Takes the operands as tensors, in the order of `Kind.operands`; returns a tensor, or one per output."""

TORCH_TYPES = {
    "fp16": torch.float32,  # arithmetic is float32; the executor rounds results where it is asked to
    "fp32": torch.float32,
    "bool": torch.bool,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
"""What a tensor of a MIL data type is while the program runs."""


@dataclass(frozen=True)
class Kind:
    """A kind of operation.

    `operands` are the parameters computed at run time. `fresh`: the result never shares memory with an operand, so a
    later operation may overwrite it. `moves`: values pass unchanged, so there is nothing to round.
    """

    operands: tuple[str, ...]
    bind: Callable[[Parameters], Step]
    fresh: bool = True
    moves: bool = False


class Parameters:
    """The constant side of one operation. `reusable` names operands whose buffer the step may overwrite.

    Raises (every getter):
        PackageError: the parameter is missing, or is not of the form asked for.
    """

    def __init__(self, operation: Operation, constants: Constants, reusable: frozenset[str] = frozenset()) -> None:
        self.operation = operation
        self.reusable = reusable
        self._constants = constants

    @property
    def output(self) -> TensorType:
        return self.operation.outputs[0]

    def array(self, name: str) -> np.ndarray | None:
        """Return a constant parameter, None if the operation does not have it."""
        arguments = self.operation.inputs.get(name, ())
        if not arguments:
            return None
        if len(arguments) > 1:
            raise PackageError(f"{self.operation.name}: expected one value for {name}, found {len(arguments)}")
        return self._constants.array(arguments[0])

    def tensor(self, name: str) -> Tensor | None:
        """Return a constant parameter as a contiguous tensor, None if the operation does not have it."""
        array = self.array(name)
        return None if array is None else to_tensor(array)

    def required(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        if tensor is None:
            raise PackageError(
                f"{self.operation.name} ({self.operation.kind}): {name} is missing; export the model again"
            )
        return tensor

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return a vector (or scalar) of integers or booleans."""
        array = self.array(name)
        if array is None and default is not None:
            return tuple(default)
        if array is None or array.dtype.kind not in "iub":
            found = "nothing" if array is None else array.dtype
            raise PackageError(
                f"{self.operation.name} ({self.operation.kind}): expected integers for {name}, found {found}"
            )
        return tuple(int(value) for value in array.reshape(-1))

    def integer(self, name: str, default: int | None = None) -> int:
        values = self.integers(name, None if default is None else (default,))
        if len(values) != 1:
            raise PackageError(f"{self.operation.name}: expected one integer for {name}, found {len(values)}")
        return values[0]

    def number(self, name: str, default: float) -> float:
        array = self.array(name)
        return default if array is None else float(array.item())

    def text(self, name: str, default: str) -> str:
        array = self.array(name)
        return default if array is None else str(array.item())


def to_tensor(array: np.ndarray) -> Tensor:
    """Copy a constant into a tensor: float16 and float32 become float32, other types stay.

    Raises:
        PackageError: the constant holds texts.
    """
    if array.dtype.kind not in "biuf":
        raise PackageError(f"expected a constant of numbers, found {array.dtype}; export the model again")
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype.kind == "f" else None, order="C"))
