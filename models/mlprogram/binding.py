"""Binds an operation to a callable: its constant parameters, and the properties of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PackageError
from .constexpr import Constants
from .program import Argument, Operation, Shape, TensorType

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
    "uint16": torch.int32,  # torch computes little on unsigned integers
    "uint32": torch.int64,
    "fp64": torch.float64,
}
"""The torch type of a tensor while the program runs, by MIL data type."""


Shapes = dict[str, list[Shape]]
"""The shapes of an operation's operands, by parameter."""

Growth = Callable[["Parameters", Shapes], list[Shape]]
"""Returns the shapes that the first result may have, or none if any is fine. Raises ValueError for absurd operands."""


@dataclass(frozen=True)
class Kind:
    """A kind of operation.

    Attributes:
        operands: parameters that are passed to the step as tensors. Any other parameter may be computed at run time
            too. The step is then bound at every run.
        bind: returns the step for one operation.
        fresh: the result never shares memory with an operand, so a later operation may overwrite it.
        moves: values pass unchanged, so there is nothing to round.
        grows: set if the result can be much larger than the operands. It is asked before anything is allocated.
    """

    operands: tuple[str, ...]
    bind: Callable[[Parameters], Step]
    fresh: bool = True
    moves: bool = False
    grows: Growth | None = None


def broadcast(*operands: str) -> Growth:
    """Returns the rule of an operation whose result has the broadcast shape of its operands."""
    return lambda p, shapes: [np.broadcast_shapes(*(shapes[name][0] for name in operands))]


class Parameters:
    """The constant parameters of one operation. `reusable` lists operands whose buffer the step may overwrite.

    Raises (every getter):
        PackageError: the parameter is missing or has another form than requested.
    """

    def __init__(
        self,
        operation: Operation,
        constants: Constants,
        reusable: frozenset[str] = frozenset(),
        computed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.operation = operation
        self.reusable = reusable
        self._constants = constants
        self._computed = computed or {}

    @property
    def output(self) -> TensorType:
        """The declared type of the first result."""
        return self.operation.outputs[0]

    def without(self, name: str) -> Parameters:
        """Returns the parameters of the same operation without one."""
        others = {other: given for other, given in self.operation.inputs.items() if other != name}
        return Parameters(replace(self.operation, inputs=others), self._constants, self.reusable, self._computed)

    def array(self, name: str) -> np.ndarray | None:
        """Returns a parameter, or None if the operation does not have it."""
        arguments = self.operation.inputs.get(name, ())
        if not arguments:
            return None
        if len(arguments) > 1:
            raise self._error(f"{name} must be one value, got {len(arguments)}")
        return self._array(arguments[0])

    def _array(self, argument: Argument) -> np.ndarray:
        if isinstance(argument, str) and argument in self._computed:
            return self._computed[argument].numpy()
        return self._constants.array(argument)

    def tensor(self, name: str) -> Tensor | None:
        """Returns a parameter as a contiguous tensor, or None if the operation does not have it."""
        array = self.array(name)
        return None if array is None else to_tensor(array)

    def required(self, name: str) -> Tensor:
        """Returns a constant parameter as a contiguous tensor."""
        tensor = self.tensor(name)
        if tensor is None:
            raise self._error(f"{name} is missing")
        return tensor

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """Returns a vector, a scalar, or a tuple of scalars, of integers or booleans."""
        arrays = [self._array(argument) for argument in self.operation.inputs.get(name, ())]
        if not arrays and default is not None:
            return tuple(default)
        if not arrays or any(array.dtype.kind not in "iub" for array in arrays):
            raise self._error(f"{name} must be integers, got {arrays[0].dtype if arrays else 'nothing'}")
        return tuple(int(value) for array in arrays for value in array.reshape(-1))

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


_RUN_TYPES = {"float16": "float32", "float64": "float32", "uint16": "int32", "uint32": "int64", "uint64": "int64"}


def to_tensor(array: np.ndarray) -> Tensor:
    """Copies a constant into a tensor of the type that it has while a program runs.

    Raises:
        PackageError: the constant is not numeric.
    """
    if array.dtype.kind not in "biuf":
        raise PackageError(f"a constant must be numeric, got {array.dtype}")
    return torch.from_numpy(np.array(array, dtype=_RUN_TYPES.get(array.dtype.name), order="C"))
