"""Elementwise operations, compared with coremltools' value inference on drawn values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvlm.models.mlprogram.ops.elementwise import ELEMENTWISE

Agree = Callable[..., None]
SHAPES = hnp.array_shapes(max_dims=4, max_side=4)


def floats(low: float = -8, high: float = 8, shape: Any = SHAPES) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(np.float32(low), np.float32(high), width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=elements)


def integers(low: int = -50, high: int = 50, shape: Any = SHAPES) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


UNARY = {
    **dict.fromkeys(("abs", "sign", "square"), (-8, 8)),
    **dict.fromkeys(("atan", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "relu6", "round"), (-8, 8)),
    **dict.fromkeys(("sigmoid", "sin", "softplus", "softsign", "tanh"), (-8, 8)),
    **dict.fromkeys(("acos", "asin"), (-1, 1)),
    **dict.fromkeys(("cosh", "sinh"), (-4, 4)),
    "atanh": (-0.875, 0.875),
    "tan": (-1, 1),
    "sqrt": (0, 8),
}
"""The functions without parameters, and the ends of their domain."""


@pytest.mark.parametrize("kind", UNARY)
@settings(max_examples=5)
@given(data=st.data())
def test_unary_function_agrees(agree: Agree, kind: str, data: st.DataObject) -> None:
    agree(kind, x=data.draw(floats(*UNARY[kind])))


@pytest.mark.parametrize("kind", ["log", "rsqrt", "inverse"])
@settings(max_examples=5)
@given(data=st.data())
def test_function_with_epsilon_agrees(agree: Agree, kind: str, data: st.DataObject) -> None:
    x = data.draw(floats(0.125, 8))
    agree(kind, x=x)
    agree(kind, x=x, epsilon=np.float32(0.25))


NUMERIC = ("add", "floor_div", "maximum", "minimum", "mod", "mul", "sub")
COMPARISONS = ("equal", "greater", "greater_equal", "less", "less_equal", "not_equal")
LOGICAL = ("logical_and", "logical_or", "logical_xor")


@pytest.mark.parametrize("kind", [*NUMERIC, *COMPARISONS])
@settings(max_examples=5)
@given(data=st.data())
def test_binary_function_broadcasts_and_agrees(agree: Agree, kind: str, data: st.DataObject) -> None:
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4, min_dims=1))
    draw = data.draw(st.sampled_from([floats, integers]))
    low = 1 if kind in ("floor_div", "mod") else -8  # division by zero is undefined
    x, y = data.draw(draw(-8, 8, shapes.input_shapes[0])), data.draw(draw(low, 8, shapes.input_shapes[1]))
    agree(kind, x=x, y=y)


@settings(max_examples=5)
@given(data=st.data())
def test_quotients_and_powers_agree(agree: Agree, data: st.DataObject) -> None:
    x, y = data.draw(floats(0.5, 4, (2, 3))), data.draw(floats(0.5, 4, (3,)))
    agree("real_div", x=x, y=y)
    agree("pow", x=x, y=y)
    i, j = data.draw(integers(-6, 6, (2, 3))), data.draw(integers(1, 4, (2, 1)))
    agree("pow", i.astype(np.int64) ** j, x=i, y=j)
    agree("real_div", np.trunc(i / j), x=i, y=j)


@pytest.mark.parametrize("kind", LOGICAL)
@settings(max_examples=5)
@given(x=hnp.arrays(bool, (3, 4)), y=hnp.arrays(bool, (4,)))
def test_logical_function_agrees(agree: Agree, kind: str, x: np.ndarray, y: np.ndarray) -> None:
    agree(kind, x=x, y=y)
    agree("logical_not", x=x)


ACTIVATIONS = ("clamped_relu", "elu", "leaky_relu", "linear_activation", "scaled_tanh", "sigmoid_hard")
WITHOUT_BETA = ("elu", "leaky_relu", "threshold", "thresholded_relu")


@pytest.mark.parametrize("kind", [*ACTIVATIONS, "clip", "threshold", "thresholded_relu"])
@settings(max_examples=5)
@given(data=st.data())
def test_activation_with_parameters_agrees(agree: Agree, kind: str, data: st.DataObject) -> None:
    alpha, beta = (np.float32(data.draw(st.floats(0, 4, width=32))) for _ in range(2))
    given = {"alpha": alpha, **({} if kind in WITHOUT_BETA else {"beta": beta})}
    if kind == "clip":
        given = {"alpha": -alpha - 1, "beta": beta}
    x = data.draw(floats())
    expected = np.where(x < alpha, 0, x) if kind == "thresholded_relu" else None  # the inference changes its operand
    agree(kind, expected, x=x, **given)


@settings(max_examples=5)
@given(x=floats(shape=(2, 3, 2, 2)), alpha=floats(0.25, 2, (3,)), beta=floats(0.25, 2, (3,)))
def test_activation_per_channel_agrees(agree: Agree, x: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> None:
    agree("prelu", x=x, alpha=alpha)
    agree("softplus_parametric", x=x, alpha=alpha, beta=beta)


@pytest.mark.parametrize("mode", ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])
@settings(max_examples=5)
@given(x=floats())
def test_gelu_agrees(agree: Agree, mode: str, x: np.ndarray) -> None:
    agree("gelu", x=x, mode=mode)


def test_gelu_of_the_largest_floats_is_finite(evaluate: Any) -> None:
    x = np.array([3e38, 1e31, 5.0, -3e38, np.inf], np.float32)
    ((found,), _) = evaluate("gelu", x=x, mode="EXACT")
    np.testing.assert_allclose(found, [3e38, 1e31, 4.9999986, 0, np.inf], rtol=1e-6)


@settings(max_examples=5)
@given(cond=hnp.arrays(bool, (2, 3)), a=floats(shape=(2, 3)), b=floats(shape=(2, 3)))
def test_select_and_silu_agree(agree: Agree, cond: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    agree("select", cond=cond, a=a, b=b)
    agree("silu", a / (1 + np.exp(-a)), x=a)


TYPES = {"int32": np.int32, "fp32": np.float32, "bool": np.bool_, "int8": np.int8, "int16": np.int16}
UNSIGNED = {"uint8": np.uint8, "uint16": np.uint16}


@pytest.mark.parametrize("dtype", [*TYPES, *UNSIGNED])
@settings(max_examples=5)
@given(data=st.data())
def test_cast_agrees_with_numpy(agree: Agree, dtype: str, data: st.DataObject) -> None:
    low, high = {"uint16": (0, 60_000), "uint8": (0, 100), "int8": (-100, 100)}.get(dtype, (-30_000, 30_000))
    x = data.draw(floats(low, high))
    agree("cast", x.astype({**TYPES, **UNSIGNED}[dtype]), x=x, dtype=dtype)
    i = data.draw(integers(low, high))
    agree("cast", i.astype({**TYPES, **UNSIGNED}[dtype]), x=i, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@settings(max_examples=5)
@given(data=st.data())
def test_quantize_and_dequantize_agree(agree: Agree, dtype: str, data: st.DataObject) -> None:
    limits = np.iinfo(dtype)
    scale = data.draw(floats(0.015625, 1, (3,)))
    zeros = data.draw(hnp.arrays(dtype, (3,), elements=st.integers(limits.min, limits.max)))
    x = data.draw(floats(-200, 200, (2, 3, 2)))
    column = (1, 3, 1)
    shifted = np.round(x / scale.reshape(column)) + zeros.reshape(column)
    expected = np.clip(shifted, limits.min, limits.max).astype(dtype)
    agree("quantize", expected, input=x, scale=scale, zero_point=zeros, axis=1, output_dtype=dtype)
    restored = (expected.astype(np.float32) - zeros.reshape(column)) * scale.reshape(column)
    agree("dequantize", restored, input=expected, scale=scale, zero_point=zeros, axis=1)


def test_every_kind_has_a_test() -> None:
    tested = {*UNARY, *NUMERIC, *COMPARISONS, *LOGICAL, *ACTIVATIONS, "clip", "threshold", "thresholded_relu"}
    tested |= {"log", "rsqrt", "inverse", "pow", "real_div", "logical_not", "prelu", "softplus_parametric"}
    assert tested | {"gelu", "select", "silu", "cast", "quantize", "dequantize"} == set(ELEMENTWISE)
