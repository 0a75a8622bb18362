"""The reference executor: runs a saved ML Program on torch, anywhere, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import PackageError, UsageError
from .binding import TORCH_TYPES
from .lowering import Instruction, lower
from .package import read_package
from .program import FLEXIBLE, NUMPY_TYPES, Program, TensorType

Precision = Literal["float32", "float16"]

_FLOAT16_LIMIT = 65520.0  # from here on rounding to float16 gives infinity


class Executor:
    """A program with its weights decoded, ready to run any number of times. Not for two threads at once.

    Arithmetic is float32. With precision "float32" the program's float16 tensors are float32, with "float16" every
    result that the program types as float16 is rounded to it, as the engine stores it (accumulation stays float32);
    constants are as stored either way. Rank 4 activations are kept channels-last. Where only the outputs are asked
    for, in float32, chains of operations run as one.

    `outputs` asks for other values than the program's own outputs, by name: any result on the way.

    Attributes:
        ranges: with `record_ranges`, the largest absolute value of every input and result so far, by name; float16
            rounding comes after it, so an overflow shows its true size.
        first_overflow: in float16, the first result of the last run that overflowed or was not a number, else None.
        working_bytes: most bytes of computed values alive at once, beside the weights.

    Raises:
        PackageError: the package cannot be read, or an operation in it cannot be run.
        UsageError: an unknown precision, or an output that the program does not compute.
    """

    def __init__(
        self,
        program: Program | str | Path,
        precision: Precision = "float32",
        record_ranges: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise UsageError(f"expected precision {' or '.join(get_args(Precision))}, found {precision!r}")
        self.program = program if isinstance(program, Program) else read_package(program)
        self.precision = precision
        self.record_ranges = record_ranges
        self.ranges: dict[str, float] = {}
        self.first_overflow: str | None = None
        self._outputs = self._output_types(outputs)
        fuse = precision == "float32" and not record_ranges
        self._plan = lower(self.program, [output.name for output in self._outputs], fuse)
        self.working_bytes = self._plan.working_bytes

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the program once; arrays in and out have the shapes and types that the program declares.

        Raises:
            PackageError: inputs missing, unexpected, of a wrong shape or not finite numbers; or an operation fails.
        """
        self.first_overflow = None
        with torch.inference_mode():
            values = list(self._plan.slots)
            for tensor, array in self._checked(inputs):
                values[self._plan.names[tensor.name]] = self._input(tensor, array)
            for instruction in self._plan.instructions:
                self._execute(instruction, values)
            return {
                output.name: self._output(output, values[self._plan.names[output.name]]) for output in self._outputs
            }

    def _execute(self, instruction: Instruction, values: list[Tensor | None]) -> None:
        operation = instruction.operation
        try:
            result = instruction.step(*[values[slot] for slot in instruction.operands])
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, MemoryError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PackageError(f"{operation.name} ({operation.kind}): {problem}; export the model again") from error
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(operation.outputs):
            raise PackageError(f"{operation.name}: expected {len(operation.outputs)} results, found {len(results)}")
        for slot, output, tensor in zip(instruction.outputs, operation.outputs, results, strict=True):
            values[slot] = self._settle(output, tensor, instruction)
        for slot in instruction.release:
            values[slot] = None

    def _settle(self, output: TensorType, tensor: Tensor, instruction: Instruction) -> Tensor:
        """Give a result the type that the program declares, and note what is asked for about it."""
        if not _fits(output, tuple(tensor.shape)):
            raise PackageError(
                f"{output.name}: expected {output}, found shape {list(tensor.shape)}; export the model again"
            )
        tensor = tensor.to(TORCH_TYPES[output.dtype])
        rounds = self.precision == "float16" and output.dtype == "fp16" and not instruction.kind.moves
        if rounds or self.record_ranges:
            self._note(output.name, tensor, rounds)
        if not rounds:
            return tensor
        half = tensor.to(torch.float16)
        return tensor.copy_(half) if instruction.kind.fresh else half.to(torch.float32)

    def _note(self, name: str, tensor: Tensor, rounds: bool) -> None:
        if tensor.dtype is torch.bool or not tensor.numel():
            return
        largest = max_abs(tensor)
        if self.record_ranges:
            self.ranges[name] = float(np.maximum(self.ranges.get(name, 0.0), largest))  # keeps a NaN, unlike max()
        if rounds and self.first_overflow is None and not largest < _FLOAT16_LIMIT:
            self.first_overflow = name

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> list[tuple[TensorType, np.ndarray]]:
        expected = [tensor.name for tensor in self.program.inputs]
        if sorted(inputs) != sorted(expected):
            raise PackageError(
                f"expected the inputs {sorted(expected)}, found {sorted(inputs)}; give each exactly once"
            )
        return [(tensor, _check_input(tensor, inputs[tensor.name])) for tensor in self.program.inputs]

    def _input(self, tensor: TensorType, array: np.ndarray) -> Tensor:
        value = torch.from_numpy(array).to(TORCH_TYPES[tensor.dtype])
        if self.precision == "float16" and tensor.dtype == "fp16":
            value = value.to(torch.float16).to(torch.float32)
        if self.record_ranges:
            self._note(tensor.name, value, False)
        return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

    def _output(self, output: TensorType, tensor: Tensor | None) -> np.ndarray:
        if tensor is None:
            raise PackageError(f"{output.name}: was not computed; export the model again")
        dtype = torch.float16 if output.dtype == "fp16" else tensor.dtype
        return np.array(tensor.to(dtype).numpy(), order="C")

    def _output_types(self, names: Sequence[str] | None) -> tuple[TensorType, ...]:
        if names is None:
            return self.program.outputs
        missing = [name for name in names if name not in self.program.types]
        if missing:
            raise UsageError(
                f"expected outputs that the program computes, found {', '.join(missing)}; see its operations"
            )
        return tuple(self.program.types[name] for name in names)


def max_abs(tensor: Tensor) -> float:
    """Return the largest absolute value of a tensor with at least one element; NaN if it holds one."""
    # in memory order: a reduction across a channels-last tensor as NCHW is 30 times slower
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    low, high = torch.aminmax(tensor.permute(order).reshape(-1))
    return float(torch.maximum(low.to(torch.float32).abs(), high.to(torch.float32).abs()))


def _fits(tensor: TensorType, shape: tuple[int, ...]) -> bool:
    if tensor.shape == shape:
        return True
    return len(shape) == tensor.rank and all(
        size in (FLEXIBLE, found) for size, found in zip(tensor.shape, shape, strict=True)
    )


def _check_input(tensor: TensorType, array: np.ndarray) -> np.ndarray:
    """Return a copy of `array` in the input's type, so that the caller's memory is never written to."""
    array = np.asarray(array)
    if not _fits(tensor, array.shape):
        raise PackageError(f"input {tensor.name}: expected shape {tensor}, found {list(array.shape)}; resize it first")
    floating = tensor.dtype in ("fp16", "fp32")
    if array.dtype.kind not in ("biuf" if floating else "biu"):
        raise PackageError(f"input {tensor.name}: expected numbers that convert to {tensor.dtype}, found {array.dtype}")
    with np.errstate(over="ignore"):  # what does not fit is refused below
        converted = np.array(array, dtype=np.float32 if floating else NUMPY_TYPES[tensor.dtype], order="C")
    if floating and not np.isfinite(converted).all():
        raise PackageError(
            f"input {tensor.name}: expected finite values, found NaN or infinity; check the preprocessing"
        )
    if not floating and not np.array_equal(converted, array):
        raise PackageError(f"input {tensor.name}: expected values in the range of {tensor.dtype}, found {array.max()}")
    return converted
