"""The constant parameters of an operation: their types, defaults and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import Constants, Operation, Program, TensorType, Value
from fastvlm.models.mlprogram.binding import Parameters, to_tensor


def constant(array: Any) -> Value:
    array = np.asarray(array)
    dtype = {"f": "fp16", "i": "int32", "b": "bool", "U": "string"}[array.dtype.kind]
    return Value(TensorType("constant", dtype, array.shape), array)


@pytest.fixture
def parameters() -> Parameters:
    values: dict[str, Any] = {
        "pad": [1, 2],
        "axis": -1,
        "keep": True,
        "epsilon": np.float16(0.5),
        "weight": np.ones((2, 3), np.float16),
        "mode": "EXACT",
    }
    inputs = {name: (constant(value),) for name, value in values.items()}
    inputs["pair"] = (constant(1), constant(2))
    operation = Operation("conv", "first", inputs, {}, (TensorType("first", "fp16", (1,)),))
    return Parameters(operation, Constants(Program((), (), (), 8, "CoreML7", {}, Path("made up"), {})))


def test_parameters_are_returned_in_their_types(parameters: Parameters) -> None:
    assert parameters.integers("pad") == (1, 2)
    assert (parameters.integer("axis"), parameters.integer("keep")) == (-1, 1)
    assert (parameters.number("epsilon", 0.0), parameters.text("mode", "")) == (0.5, "EXACT")
    weight = parameters.required("weight")
    assert weight.dtype is torch.float32 and weight.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_absent_parameters_have_their_defaults(parameters: Parameters) -> None:
    assert parameters.array("absent") is None and parameters.tensor("absent") is None
    assert (parameters.integers("absent", [3, 4]), parameters.integer("absent", 5)) == ((3, 4), 5)
    assert (parameters.number("absent", 0.25), parameters.text("absent", "valid")) == (0.25, "valid")


@pytest.mark.parametrize(
    ("get", "message"),
    [
        (lambda p: p.required("absent"), "absent is missing"),
        (lambda p: p.integers("absent"), "absent must be integers, got nothing"),
        (lambda p: p.integers("epsilon"), "epsilon must be integers, got float16"),
        (lambda p: p.integer("pad"), "pad must be one integer, got 2"),
        (lambda p: p.array("pair"), "pair must be one value, got 2"),
    ],
)
def test_wrong_parameters_name_the_operation(
    parameters: Parameters, get: Callable[[Parameters], Any], message: str
) -> None:
    with pytest.raises(PackageError, match=rf"^first \(conv\): {message}$"):
        get(parameters)


def test_string_constant_is_not_a_tensor() -> None:
    with pytest.raises(PackageError, match="a constant must be numeric, got <U5"):
        to_tensor(np.array("EXACT"))
