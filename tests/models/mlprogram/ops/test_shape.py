"""Operations that move values, compared with coremltools' value inference, numpy and torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastvlm.models.mlprogram.ops.shape import SHAPES

Agree = Callable[..., None]
SIZES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)


def numbered(shape: Any) -> np.ndarray:
    """Returns an array of a shape whose elements all differ."""
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


@settings(max_examples=15)
@given(data=st.data())
def test_reshape_agrees(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(SIZES)
    wanted = list(data.draw(st.permutations(shape)))
    choice = data.draw(st.sampled_from(["whole", "inferred", "kept"]))
    if choice == "inferred":
        wanted[data.draw(st.integers(0, len(wanted) - 1))] = -1
    elif choice == "kept":
        at = data.draw(st.integers(0, len(shape) - 1))
        wanted = [0 if i == at else size for i, size in enumerate(shape)]
    agree("reshape", x=numbered(shape), shape=wanted)


@settings(max_examples=10)
@given(data=st.data())
def test_axes_are_added_moved_and_removed(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(SIZES)
    x, rank = numbered(shape), len(shape)
    agree(
        "expand_dims",
        x=x,
        axes=[
            data.draw(st.integers(-rank - 1, rank)),
        ],
    )
    agree("transpose", x=x, perm=list(data.draw(st.permutations(range(rank)))))
    agree(
        "reverse", x=x, axes=data.draw(st.lists(st.integers(-rank, rank - 1), unique_by=lambda a: a % rank, min_size=1))
    )
    agree("flatten2d", x=numbered((2, *shape)), axis=data.draw(st.integers(1, rank)))
    agree("shape", np.array(shape, np.int32), x=x)
    agree("identity", x=x)


def test_squeeze_leaves_an_axis_of_another_size_alone(agree: Agree) -> None:
    x = numbered((1, 3, 1, 2))
    agree("squeeze", x[0, :, 0], x=x, axes=[0, 2])
    agree("squeeze", x[0], x=x, axes=[0, 1])
    agree("squeeze", x[0, :, 0], x=x)


@settings(max_examples=30)
@given(data=st.data())
def test_slice_by_index_agrees(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=5))
    entries = []
    for size in shape:
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        first = data.draw(st.integers(0, size - 1))
        last = data.draw(st.integers(first + 1, size)) if step > 0 else data.draw(st.integers(0, first))
        wraps = data.draw(st.booleans())
        begin = first - size if wraps else first
        masks = [data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())]
        if step < 0:
            masks[0] = False  # "sets begin to 0" contradicts the inference of a negative stride
            masks[1] = masks[1] or last >= first
        if masks[2]:
            last, step = first + 1, 1
        entries.append((begin, last, step, *masks))
    begin, end, stride, begin_mask, end_mask, squeeze_mask = (list(column) for column in zip(*entries, strict=True))
    agree(
        "slice_by_index", x=numbered(shape), begin=begin, end=end, stride=stride,
        begin_mask=begin_mask, end_mask=end_mask, squeeze_mask=squeeze_mask,
    )  # fmt: skip


def test_begin_mask_takes_precedence_over_an_index(agree: Agree) -> None:
    masks = {"begin_mask": [True], "squeeze_mask": [True]}
    agree("slice_by_index", x=numbered(5), begin=[3], end=[4], **masks)


@settings(max_examples=10)
@given(data=st.data())
def test_slice_by_size_agrees(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(SIZES)
    begin = [data.draw(st.integers(0, size - 1)) for size in shape]
    pairs = list(zip(shape, begin, strict=True))
    sizes = [data.draw(st.sampled_from([-1, *range(1, size - first + 1)])) for size, first in pairs]
    agree("slice_by_size", x=numbered(shape), begin=begin, size=sizes)


@pytest.mark.parametrize("stride", [[1, 1], [2, 1], [-1, 2]])
def test_slice_update_agrees(agree: Agree, stride: list[int]) -> None:
    begin, end = ([3, 0], [0, 4]) if stride[0] < 0 else ([0, 0], [3, 4])
    part = numbered((4, 4))[begin[0] : end[0] : stride[0], begin[1] : end[1] : stride[1]]
    update, expected = -part - 1, numbered((4, 4))
    expected[begin[0] : end[0] : stride[0], begin[1] : end[1] : stride[1]] = update
    given_slice = {"begin": begin, "end": end, "stride": stride}
    agree("slice_update", expected, "iOS18", x=numbered((4, 4)), update=update, **given_slice)


@settings(max_examples=10)
@given(data=st.data())
def test_tensors_are_joined_and_split(agree: Agree, data: st.DataObject) -> None:
    shape = data.draw(SIZES)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    values = [numbered(shape) + 100 * i for i in range(data.draw(st.integers(1, 3)))]
    agree("concat", values=values, axis=axis)
    agree("stack", values=values, axis=axis)
    joined = np.concatenate(values, axis)
    parts = list(np.split(joined, len(values), axis))
    agree("split", parts, x=joined, axis=axis, num_splits=len(values))
    agree("split", parts, x=joined, axis=axis, split_sizes=[shape[axis]] * len(values))


def test_scalars_are_joined_to_a_vector(agree: Agree) -> None:
    agree("concat", np.array([1, 2], np.float32), values=[np.float32(1), np.float32(2)], axis=0)


def test_interleaved_concat_alternates(agree: Agree) -> None:
    x, y = numbered((2, 3)), numbered((2, 3)) + 100
    agree("concat", np.stack([x, y], 2).reshape(2, 6), values=[x, y], axis=1, interleave=True)


@pytest.mark.parametrize(
    ("mode", "numpy_mode"), [("constant", "constant"), ("reflect", "reflect"), ("replicate", "edge")]
)
@settings(max_examples=8)
@given(data=st.data())
def test_pad_agrees_with_numpy(agree: Agree, mode: str, numpy_mode: str, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=4))
    amounts = [tuple(data.draw(st.integers(0, size - 1)) for _ in range(2)) for size in shape[-2:]]
    pairs = [(0, 0)] * (len(shape) - 2) + amounts
    extra: dict[str, Any] = {"constant_values": 7} if mode == "constant" else {}
    expected = np.pad(numbered(shape), pairs, mode=numpy_mode, **extra)  # type: ignore[call-overload]
    flat = [amount for pair in pairs for amount in pair]
    agree("pad", expected, x=numbered(shape), pad=flat, mode=mode, constant_val=np.float32(7))


@settings(max_examples=8)
@given(shape=SIZES, data=st.data())
def test_repeated_and_filled_tensors_agree(agree: Agree, shape: tuple[int, ...], data: st.DataObject) -> None:
    agree("tile", x=numbered(shape), reps=[data.draw(st.integers(1, 3)) for _ in shape])
    agree("fill", shape=list(shape), value=np.float32(2.5))
    agree("fill", shape=list(shape), value=np.int32(3))
    agree("fill_like", ref_tensor=numbered(shape), value=np.float32(2.5))
    start, step = data.draw(st.integers(-5, 5)), data.draw(st.sampled_from([1, 2, -1]))
    agree("range_1d", start=start, end=start + step * data.draw(st.integers(1, 6)), step=step)


def test_reshape_like_takes_parts_of_other_shapes(agree: Agree) -> None:
    references = [numbered((2, 3, 4)), numbered((1, 5, 6))]
    parts = {"begins": (0, 1), "ends": (2, 0), "end_masks": (False, True)}
    agree("reshape_like", numbered((2, 3, 5, 6)), x=numbered(180), ref_tensors=references, **parts)


def test_reverse_sequence_reverses_the_first_values(agree: Agree) -> None:
    x = numbered((2, 4))
    expected = np.array([[2, 1, 0, 3], [4, 5, 6, 7]], np.float32)
    agree("reverse_sequence", expected, x=x, lengths=np.array([3, 1], np.int32), seq_axis=1, batch_axis=0)
    agree("reverse_sequence", expected.T, x=x.T.copy(), lengths=np.array([3, 1], np.int32), seq_axis=0, batch_axis=1)


def test_sliding_windows_agree(agree: Agree) -> None:
    x = numbered((2, 7, 3))
    expected = np.stack([x[:, at : at + 3] for at in (0, 2, 4)], 1)
    agree("sliding_windows", expected, x=x, axis=1, size=3, stride=2)


def test_space_and_depth_are_exchanged(agree: Agree) -> None:
    x = torch.from_numpy(numbered((2, 8, 4, 6)))
    agree("pixel_shuffle", F.pixel_shuffle(x, 2).numpy(), x=x.numpy(), upscale_factor=2)
    agree("pixel_unshuffle", F.pixel_unshuffle(x, 2).numpy(), x=x.numpy(), downscale_factor=np.uint32(2))
    blocks = x.numpy().reshape(2, 8, 2, 2, 3, 2)
    deep = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(2, 32, 2, 3)  # TensorFlow's order: the block before the channel
    agree("space_to_depth", deep, x=x.numpy(), block_size=2)
    agree("depth_to_space", x.numpy(), x=deep, block_size=2)


def test_space_and_batch_are_exchanged(agree: Agree) -> None:
    x = numbered((1, 2, 4, 6))
    expected = np.concatenate([x[:, :, i::2, j::2] for i in range(2) for j in range(2)])
    agree("space_to_batch", expected, x=x, block_shape=[2, 2], paddings=[[0, 0], [0, 0]])
    agree("batch_to_space", x[:, :, 1:, :4], x=expected, block_shape=[2, 2], crops=[[1, 0], [0, 2]])


def test_every_kind_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [kind for kind in SHAPES if not re.search(rf'agree\(\s*"{kind}"', source)] == []
