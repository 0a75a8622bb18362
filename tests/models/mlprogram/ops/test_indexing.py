"""Operations that choose places by indices, compared with coremltools' value inference and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvlm.models.errors import PackageError

Agree = Callable[..., None]


def numbered(shape: Any) -> np.ndarray:
    """Returns an array of a shape whose elements all differ."""
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


def indices(size: int, shape: Any, low: int = 0) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, shape, elements=st.integers(low, size - 1))


@settings(max_examples=15)
@given(data=st.data())
def test_gather_agrees(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    chosen = data.draw(indices(shape[axis], data.draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=3))))
    agree("gather", x=numbered(shape), indices=chosen, axis=axis)


@settings(max_examples=8)
@given(data=st.data())
def test_gather_in_batches_agrees(agree: Agree, data: st.DataObject) -> None:
    axis = data.draw(st.integers(1, 2))
    chosen = data.draw(indices((3, 4)[axis - 1], (2, 2)))
    agree("gather", x=numbered((2, 3, 4)), indices=chosen, axis=axis, batch_dims=1)


def test_negative_indices_count_from_the_end(agree: Agree) -> None:
    x = numbered((4, 2))
    agree("gather", x[[-1, 1]], "iOS16", x=x, indices=np.array([-1, 1], np.int32), axis=0)
    agree("gather", x[2], x=x, indices=np.int32(2), axis=0)
    agree("gather", x[2, 1], x=x[2], indices=np.int32(1), axis=0)


def test_index_outside_the_axis_is_one_error(evaluate: Callable[..., Any]) -> None:
    with pytest.raises(PackageError, match=r"\(gather\): indices must be within an axis of size 4, got 4$"):
        evaluate("gather", infer=False, x=numbered((4, 2)), indices=np.array([4], np.int32), axis=0)


@settings(max_examples=10)
@given(data=st.data())
def test_gather_along_axis_agrees(agree: Agree, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-3, 2))
    shape = [2, 3, 4]
    size = shape[axis]
    shape[axis] = data.draw(st.integers(1, 5))
    chosen = data.draw(indices(size, tuple(shape)))
    agree("gather_along_axis", x=numbered((2, 3, 4)), indices=chosen, axis=axis)


@pytest.mark.parametrize("count", [1, 2, 3])
@settings(max_examples=5)
@given(data=st.data())
def test_gather_nd_agrees_with_numpy(agree: Agree, count: int, data: st.DataObject) -> None:
    x, chosen = numbered((3, 4, 2)), data.draw(indices(2, (2, 5, count)))
    agree("gather_nd", x[tuple(np.moveaxis(chosen, -1, 0))], x=x, indices=chosen)
    batched = data.draw(indices(2, (3, 5, 1)))
    agree("gather_nd", np.stack([x[i][batched[i, :, 0]] for i in range(3)]), x=x, indices=batched, batch_dims=1)


UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda a, b: b,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", UPDATES)
@settings(max_examples=5)
@given(data=st.data())
def test_scatters_agree_with_a_loop(agree: Agree, mode: str, data: st.DataObject) -> None:
    x, combine = numbered((3, 4)) + 1, UPDATES[mode]
    twice = mode not in ("update", "div")  # the order of two updates of one place is not defined
    rows = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=2, unique=not twice))
    updates = data.draw(hnp.arrays(np.float32, (2, 4), elements=st.integers(1, 8)))
    whole, along, places = x.copy(), x.copy(), x.copy()
    for row, update in zip(rows, updates, strict=True):
        whole[row] = combine(whole[row], update)
    chosen = np.array(rows, np.int32)
    agree("scatter", whole, data=x, indices=chosen, updates=updates, axis=0, mode=mode)
    table = np.stack([chosen] * 4, 1)
    for i, j in np.ndindex(2, 4):
        along[table[i, j], j] = combine(along[table[i, j], j], updates[i, j])
    agree("scatter_along_axis", along, data=x, indices=table, updates=updates, axis=0, mode=mode)
    pairs = np.stack([chosen, [1, 3]], 1).astype(np.int32)
    for (i, j), update in zip(pairs, updates[:, 0], strict=True):
        places[i, j] = combine(places[i, j], update)
    agree("scatter_nd", places, data=x, indices=pairs, updates=updates[:, 0], mode=mode)


@settings(max_examples=8)
@given(chosen=indices(4, (2, 3), -1), axis=st.integers(-3, 2))
def test_one_hot_agrees_with_numpy(agree: Agree, chosen: np.ndarray, axis: int) -> None:
    expected = np.where(chosen[..., None] == np.arange(4), np.float32(2), np.float32(-1))
    values = {"on_value": np.float32(2), "off_value": np.float32(-1)}
    agree("one_hot", np.moveaxis(expected, -1, axis), indices=chosen, one_hot_vector_size=4, axis=axis, **values)


@settings(max_examples=8)
@given(lower=st.integers(-1, 3), upper=st.integers(-1, 3))
def test_band_part_agrees(agree: Agree, lower: int, upper: int) -> None:
    agree("band_part", x=numbered((2, 4, 3)) + 1, lower=lower, upper=upper)


@settings(max_examples=8)
@given(x=hnp.arrays(np.float32, (2, 3, 2), elements=st.integers(0, 1)))
def test_non_zero_agrees(agree: Agree, x: np.ndarray) -> None:
    agree("non_zero", np.argwhere(x).astype(np.int32), x=x)
