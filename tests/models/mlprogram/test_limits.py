"""Programs that need absurd memory are refused before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.limits import MAX_BYTES

Edit = Callable[[Path, Callable[[Any], None]], Path]


def operation(block: Any, kind: str) -> Any:
    return next(item for item in block.operations if item.type == kind)


def constant(block: Any, name: str) -> Any:
    """Returns the value of the first convolution's constant `name`."""
    wanted = operation(block, "conv").inputs[name].arguments[0].name
    made = next(item for item in block.operations if item.outputs and item.outputs[0].name == wanted)
    return made.attributes["val"]


def test_small_program_is_accepted(small_package: Path) -> None:
    Executor(small_package).run({"x": np.zeros((1, 8, 6, 6), np.float32)})


def test_paddings_beyond_the_kernel_are_refused(save_program: Callable[..., Path], edit: Edit, block_of: Any) -> None:
    def build(mb: Any, x: Any) -> Any:
        return mb.conv(x=x, weight=np.ones((2, 2, 3, 3)), pad_type="custom", pad=[1, 1, 1, 1])

    package = save_program(build, {"x": (1, 2, 6, 6)})
    Executor(package)

    def change(model: Any) -> None:
        constant(block_of(model), "pad").immediateValue.tensor.ints.values[0] = 2**30

    with pytest.raises(PackageError, match=r"conv.*paddings must be at most the kernel's spans \[3, 3\]"):
        Executor(edit(package, change))


@pytest.mark.parametrize("kind", ["add", "matmul", "concat"])
def test_results_larger_than_the_operands_are_refused(
    save_program: Callable[..., Path], edit: Edit, block_of: Any, kind: str
) -> None:
    def build(mb: Any, x: Any, y: Any) -> Any:
        made = {"add": mb.add, "matmul": mb.matmul}.get(kind)
        return made(x=x, y=y) if made else mb.concat(values=[x, y], axis=0)

    package = save_program(build, {"x": (4, 4), "y": (4, 4)})
    Executor(package).run({name: np.ones((4, 4), np.float32) for name in "xy"})

    def change(model: Any) -> None:
        operation(block_of(model), kind).outputs[0].type.tensorType.dimensions[0].constant.size = 5

    with pytest.raises(PackageError, match=r"must be fp32\[5, 4\], got shape \[[48], 4\]"):
        Executor(edit(package, change))


def test_values_of_absurd_size_are_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        operation(block_of(model), "gelu").outputs[0].type.tensorType.dimensions[0].constant.size = 2**34

    with pytest.raises(PackageError, match=rf"values must take at most {MAX_BYTES} bytes|got shape"):
        Executor(edit(small_package, change))


def test_open_shape_with_fixed_inputs_is_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        dimension = operation(block_of(model), "gelu").outputs[0].type.tensorType.dimensions[0]
        dimension.ClearField("constant")
        dimension.unknown.variadic = False

    with pytest.raises(PackageError, match="must have a fixed shape"):
        Executor(edit(small_package, change))


def test_too_many_operations_are_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        operations = block_of(model).operations
        gelu = operation(block_of(model), "gelu")
        for _ in range(20_000):
            operations.add().CopyFrom(gelu)

    with pytest.raises(PackageError, match="must have at most 20000 operations"):
        read_package(edit(small_package, change))
