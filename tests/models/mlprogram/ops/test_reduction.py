"""Operations along axes, compared with coremltools' value inference, numpy and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvlm.models.mlprogram.ops.reduction import REDUCTIONS

Agree = Callable[..., None]


def floats(shape: Any, low: float = -4, high: float = 4) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(np.float32(low), np.float32(high), width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=elements)


@st.composite
def reductions(draw: st.DrawFn, low: float = -4) -> dict[str, Any]:
    """A tensor, some of its axes and `keep_dims`."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=4))
    axes = draw(st.lists(st.integers(-len(shape), len(shape) - 1), min_size=1, unique_by=lambda a: a % len(shape)))
    return {"x": draw(floats(shape, low)), "axes": axes, "keep_dims": draw(st.booleans())}


FLOATING = {
    "reduce_l1_norm": -4, "reduce_l2_norm": -4, "reduce_log_sum": 0.5, "reduce_log_sum_exp": -4, "reduce_max": -4,
    "reduce_mean": -4, "reduce_min": -4, "reduce_prod": -2, "reduce_sum": -4, "reduce_sum_square": -4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOATING)
@settings(max_examples=8)
@given(data=st.data())
def test_reduction_agrees(agree: Agree, kind: str, data: st.DataObject) -> None:
    agree(kind, **data.draw(reductions(FLOATING[kind])))


@pytest.mark.parametrize("kind", ["reduce_max", "reduce_min", "reduce_sum", "reduce_sum_square", "reduce_prod"])
@settings(max_examples=5)
@given(x=hnp.arrays(np.int32, (2, 3, 4), elements=st.integers(-4, 4)), axis=st.integers(-3, 2))
def test_reduction_of_integers_agrees(agree: Agree, kind: str, x: np.ndarray, axis: int) -> None:
    agree(kind, x=x, axes=[axis], keep_dims=False)


@settings(max_examples=5)
@given(x=hnp.arrays(np.int32, (2, 3), elements=st.integers(-9, 9)))
def test_mean_of_integers_is_truncated(agree: Agree, x: np.ndarray) -> None:
    agree("reduce_mean", np.trunc(x.mean(1)).astype(np.int32), x=x, axes=[1], keep_dims=False)


@pytest.mark.parametrize("kind", ["reduce_argmax", "reduce_argmin"])
@settings(max_examples=8)
@given(x=hnp.arrays(np.float32, (3, 4), elements=st.integers(0, 3)), axis=st.integers(-2, 1), keep=st.booleans())
def test_arg_takes_the_first_of_equal_values(agree: Agree, kind: str, x: np.ndarray, axis: int, keep: bool) -> None:
    agree(kind, x=x, axis=axis, keep_dims=keep)


@settings(max_examples=8)
@given(x=floats((2, 3, 4)), axis=st.integers(-3, 2))
def test_softmax_agrees(agree: Agree, x: np.ndarray, axis: int) -> None:
    agree("softmax", x=x, axis=axis)


@settings(max_examples=8)
@given(x=floats((2, 3, 2, 2)), gamma=floats(3), beta=floats(3), variance=floats(3, 0.5))
def test_normalizations_agree(
    agree: Agree, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, variance: np.ndarray
) -> None:
    column = (1, 3, 1, 1)
    centred = (x - beta.reshape(column)) / np.sqrt(variance.reshape(column) + np.float32(0.01))
    agree(
        "batch_norm", centred * gamma.reshape(column) + beta.reshape(column),
        x=x, mean=beta, variance=variance, gamma=gamma, beta=beta, epsilon=np.float32(0.01),
    )  # fmt: skip
    wide = x.astype(np.float64)
    deviation = wide - wide.mean((2, 3), keepdims=True)
    normal = deviation / np.sqrt((deviation**2).mean((2, 3), keepdims=True) + 0.5)
    expected = normal * gamma.reshape(column) + beta.reshape(column)
    agree("instance_norm", expected, x=x, gamma=gamma, beta=beta, epsilon=np.float32(0.5))
    agree("layer_norm", x=x, axes=[-2, -1], epsilon=np.float32(0.5))
    agree("l2_norm", x=x, epsilon=np.float32(0.5))


def test_instance_norm_of_one_position_is_its_offset(agree: Agree) -> None:
    x, beta = np.full((1, 2, 1, 1), 3, np.float32), np.array([1, 2], np.float32)
    agree("instance_norm", beta.reshape(1, 2, 1, 1), x=x, gamma=beta, beta=beta)


@settings(max_examples=5)
@given(x=floats((1, 6, 2, 3)), size=st.integers(1, 5))
def test_local_response_norm_is_torchs(agree: Agree, x: np.ndarray, size: int) -> None:
    expected = F.local_response_norm(torch.from_numpy(x), size, 0.5, 0.75, 2.0).numpy()
    alpha, beta, k = np.float32(0.5), np.float32(0.75), np.float32(2)
    agree("local_response_norm", expected, x=x, size=size, alpha=alpha, beta=beta, k=k)


@settings(max_examples=10)
@given(x=floats((2, 3, 4)), axis=st.integers(-1, 2), exclusive=st.booleans(), reverse=st.booleans())
def test_cumsum_agrees_with_numpy(agree: Agree, x: np.ndarray, axis: int, exclusive: bool, reverse: bool) -> None:
    ordered = np.flip(x, axis) if reverse else x
    total = np.cumsum(ordered, axis) - (ordered if exclusive else 0)
    agree("cumsum", np.flip(total, axis) if reverse else total, x=x, axis=axis, exclusive=exclusive, reverse=reverse)


@settings(max_examples=8)
@given(x=hnp.arrays(np.float32, (3, 5), unique=True, elements=st.integers(-40, 40)), data=st.data())
def test_order_agrees(agree: Agree, x: np.ndarray, data: st.DataObject) -> None:
    axis, ascending = data.draw(st.integers(-2, 1)), data.draw(st.booleans())
    agree("argsort", x=x, axis=axis, ascending=ascending)
    agree("topk", x=x, axis=axis, ascending=ascending, k=data.draw(st.integers(1, 3)))


def test_every_kind_has_a_test() -> None:
    others = {"reduce_argmax", "reduce_argmin", "softmax", "batch_norm", "instance_norm", "layer_norm", "l2_norm"}
    assert {*FLOATING, *others, "local_response_norm", "cumsum", "argsort", "topk"} == set(REDUCTIONS)
