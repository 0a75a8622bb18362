"""Runs a saved ML Program on torch, on any machine, where Core ML is not available.

It is an optimizing executor: it reuses buffers, writes in place and fuses chains of operations, because its speed is
part of the time to first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import PackageError, UsageError
from .binding import TORCH_TYPES
from .lowering import MAX_BYTES, Instruction, lower
from .ops import FLOAT16_SUMS
from .package import read_package
from .program import FLEXIBLE, NUMPY_TYPES, Program, Shape, TensorType

Precision = Literal["float32", "float16", "float16-accumulate"]
"""The types that float16 results are stored in, and that products are summed in: see `Executor`."""

State = dict[str, Tensor]
"""The values of a program's states by name, which a run changes."""

_FLOAT16_LIMIT = 65520.0  # from here on rounding to float16 gives infinity


class Executor:
    """A program with decoded weights, ready to run any number of times. Not thread-safe.

    `precision="float16"` is the unfused reference: each result of type float16 is rounded, as the Neural Engine stores
    it, and accumulation stays float32. `precision="float16-accumulate"` also sums products of matrices in float16, step
    by step, as Apple's Core AI interpreter does (`ops/accumulation.py`). `precision="float32"` computes float16 tensors
    in float32 and fuses chains of operations, unless `record_ranges` is set. A cast to float16 that only other casts
    read rounds in each mode. Constants are as stored either way. Rank 4 activations are channels-last. `outputs`
    selects any results of the program by name instead of its own outputs.

    Attributes:
        ranges: with `record_ranges`, the largest absolute value of every input and result so far, by name. It is
            taken before rounding to float16, so an overflow shows its true size.
        first_overflow: where results are rounded, the first one of the last run that overflowed or was NaN, else None.
        working_bytes: the peak of the bytes of computed values alive at once, without the weights.

    Raises:
        PackageError: the package cannot be read, or an operation in it cannot be run.
        UsageError: the precision is unknown, or the program does not compute one of `outputs`.
    """

    def __init__(
        self,
        program: Program | str | Path,
        precision: Precision = "float32",
        record_ranges: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise UsageError(
                f"precision must be one of {', '.join(get_args(Precision))} (got {precision!r})", "precision"
            )
        self.program = program if isinstance(program, Program) else read_package(program)
        self.precision = precision
        self._rounds = precision != "float32"
        self.record_ranges = record_ranges
        self.ranges: dict[str, float] = {}
        self.first_overflow: str | None = None
        self._alive = 0
        self._outputs = self._output_types(outputs)
        fuse = precision == "float32" and not record_ranges
        others = FLOAT16_SUMS if precision == "float16-accumulate" else None
        self._plan = lower(self.program, [output.name for output in self._outputs], fuse, others)
        self.working_bytes = self._plan.working_bytes

    def run(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, Any]:
        """Runs the program once. Arrays in and out have the shapes and types that the program declares.

        `state` is changed in place. Without one the run starts from zeros. A classifier's outputs are a label and a
        dictionary.

        Raises:
            PackageError: inputs are missing, unexpected, of a wrong shape or NaN, or an operation fails.
        """
        self.first_overflow = None
        self._alive = 0
        with torch.inference_mode():
            values = list(self._plan.slots)
            for tensor, array in self._checked(inputs):
                values[self._plan.names[tensor.name]] = self._input(tensor, array)
            for name, content in (self.make_state() if state is None else state).items():
                values[self._plan.names[name]] = content
            for instruction in self._plan.instructions:
                self._execute(instruction, values)
            return {
                output.name: self._output(output, values[self._plan.names[output.name]]) for output in self._outputs
            }

    def make_state(self) -> State:
        """Returns a new state of zeros for the program's states, by name."""
        return {state.name: torch.zeros(state.shape, dtype=TORCH_TYPES[state.dtype]) for state in self.program.states}

    def _execute(self, instruction: Instruction, values: list[Tensor | None]) -> None:
        operation = instruction.operation
        try:
            result = instruction.step(*[values[slot] for slot in instruction.operands])
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, MemoryError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PackageError(f"{operation.name} ({operation.kind}): {problem}") from error
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(operation.outputs):
            raise PackageError(f"{operation.name}: must have {len(operation.outputs)} results, got {len(results)}")
        for slot, output, tensor in zip(instruction.outputs, operation.outputs, results, strict=True):
            values[slot] = self._finish_result(output, tensor, instruction)
        if self._plan.is_open:
            self._check_memory(instruction, values)
        for slot in instruction.release:
            values[slot] = None

    def _check_memory(self, instruction: Instruction, values: list[Tensor | None]) -> None:
        """Raises PackageError if the values alive take too much memory, where the declared shapes do not say."""
        self._alive += sum(_nbytes(values[slot]) for slot in instruction.outputs)
        if self._alive > MAX_BYTES:
            raise PackageError(
                f"{instruction.operation.name}: the values must take at most {MAX_BYTES} bytes, got {self._alive}. "
                "Pass smaller inputs."
            )
        self._alive -= sum(_nbytes(values[slot]) for slot in instruction.release)

    def _finish_result(self, output: TensorType, tensor: Tensor, instruction: Instruction) -> Tensor:
        """Converts a result to its declared type, and records its range and overflow if requested."""
        if not isinstance(tensor, Tensor):
            return tensor  # a classifier's label or dictionary
        if not _fits(output, tuple(tensor.shape)):
            raise PackageError(f"{output.name}: must be {output}, got shape {list(tensor.shape)}")
        tensor = tensor.to(TORCH_TYPES[output.dtype])
        rounds = self._rounds and output.dtype == "fp16" and not instruction.kind.moves
        if rounds or self.record_ranges:
            self._record(output.name, tensor, rounds)
        if not rounds:
            return tensor
        half = tensor.to(torch.float16)
        return tensor.copy_(half) if instruction.kind.fresh else half.to(torch.float32)

    def _record(self, name: str, tensor: Tensor, rounds: bool) -> None:
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
            raise PackageError(f"the inputs must be {sorted(expected)}, got {sorted(inputs)}")
        return [(tensor, _check_input(tensor, inputs[tensor.name])) for tensor in self.program.inputs]

    def _input(self, tensor: TensorType, array: np.ndarray) -> Tensor:
        value = torch.from_numpy(array).to(TORCH_TYPES[tensor.dtype])
        if self._rounds and tensor.dtype == "fp16":
            value = value.to(torch.float16).to(torch.float32)
        if self.record_ranges:
            self._record(tensor.name, value, False)
        return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

    def _output(self, output: TensorType, tensor: Tensor | None) -> Any:
        if tensor is None:
            raise PackageError(f"{output.name}: was not computed")
        if not isinstance(tensor, Tensor):
            return tensor
        with np.errstate(over="ignore"):  # infinity shows an overflow
            return np.array(tensor.numpy(), dtype=NUMPY_TYPES[output.dtype], order="C")

    def _output_types(self, names: Sequence[str] | None) -> tuple[TensorType, ...]:
        if names is None:
            return self.program.outputs
        missing = [name for name in names if name not in self.program.types]
        if missing:
            raise UsageError(f"outputs must be results of the program, got {', '.join(missing)}")
        return tuple(self.program.types[name] for name in names)


def _nbytes(value: Tensor | None) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0


def max_abs(tensor: Tensor) -> float:
    """Returns the largest absolute value of a tensor with at least one element, or NaN if one is NaN."""
    # In memory order, because reducing a channels-last tensor as NCHW is 30 times slower.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    low, high = torch.aminmax(tensor.permute(order).reshape(-1))
    return float(torch.maximum(low.to(torch.float32).abs(), high.to(torch.float32).abs()))


def _fits(tensor: TensorType, shape: Shape) -> bool:
    if tensor.shape == shape:
        return True
    return len(shape) == tensor.rank and all(
        size in (FLEXIBLE, found) for size, found in zip(tensor.shape, shape, strict=True)
    )


def _check_input(tensor: TensorType, array: np.ndarray) -> np.ndarray:
    """Returns a copy of `array` in the input's type, so that the caller's memory is never written to."""
    array = np.asarray(array)
    if not _fits(tensor, array.shape):
        raise PackageError(f"input {tensor.name}: shape must be {tensor}, got {list(array.shape)}. Resize it first.")
    floating = tensor.dtype in ("fp16", "fp32")
    if array.dtype.kind not in ("biuf" if floating else "biu"):
        raise PackageError(f"input {tensor.name}: must be numbers that convert to {tensor.dtype}, got {array.dtype}")
    with np.errstate(over="ignore"):  # a value out of range becomes infinite, which is allowed
        converted = np.array(array, dtype=np.float32 if floating else NUMPY_TYPES[tensor.dtype], order="C")
    if floating and np.isnan(converted).any():
        raise PackageError(f"input {tensor.name}: values must be numbers, got NaN. Check the preprocessing.")
    if floating and np.isinf(converted).any() and not np.isinf(array).any():
        raise PackageError(f"input {tensor.name}: values must be in the range of float32, got {np.abs(array).max():g}")
    if not floating and not np.array_equal(converted, array):
        raise PackageError(f"input {tensor.name}: values must be in the range of {tensor.dtype}, got {array.max()}")
    return converted
