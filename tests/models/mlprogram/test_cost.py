"""The cost of an operation is counted from its operands, and a missing operand is one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import read_package
from fastvlm.models.mlprogram.cost import COSTLY, flops, moved_elements


def costs(package: Path) -> dict[str, tuple[int, int]]:
    program = read_package(package)
    return {
        operation.kind: (flops(program, operation), moved_elements(program, operation))
        for operation in program.operations
        if operation.kind in COSTLY
    }


def matmul(mb: Any, x: Any, y: Any) -> Any:
    return mb.matmul(x=x, y=y, transpose_x=True)


@pytest.mark.slow
def test_flops_count_the_summed_dimension(save_program: Callable[..., Path]) -> None:
    assert costs(save_program(matmul, {"x": (5, 2), "y": (5, 3)})) == {"matmul": (2 * 2 * 3 * 5, 10 + 15 + 6)}

    def conv(mb: Any, x: Any) -> Any:
        return mb.conv(x=x, weight=np.ones((4, 2, 3, 3)), pad_type="same")

    assert costs(save_program(conv, {"x": (1, 2, 6, 6)})) == {"conv": (2 * 144 * 18, 72 + 144)}


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda op: op.inputs.pop("x"), lambda op: op.inputs["x"].ClearField("arguments")])
def test_missing_operand_is_one_error(
    save_program: Callable[..., Path], edit: Callable[..., Path], block_of: Any, change: Callable[[Any], Any]
) -> None:
    package = save_program(matmul, {"x": (5, 2), "y": (5, 3)})

    def changed(model: Any) -> None:
        change(next(item for item in block_of(model).operations if item.type == "matmul"))

    with pytest.raises(PackageError, match=r"\(matmul\): x is missing$"):
        costs(edit(package, changed))
