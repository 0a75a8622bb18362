"""Operations that sample images, compared with torch and with the grids that the MIL reference defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError

Agree = Callable[..., None]
MODES = ("DEFAULT", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grid(size: int, count: int, mode: str) -> np.ndarray:
    """Returns the sampled points as the documentation of `resize_bilinear` writes them, one by one."""
    points = []
    for i in range(count):
        if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and count > 1):
            point = i * ((size - 1) / (count - 1) if count > 1 else 0.0)
        elif mode == "ALIGN_CORNERS":
            point = (size - 1) / 2
        elif mode == "DEFAULT":
            point = i * ((size - size / count) / (count - 1) if count > 1 else 0.0)
        elif mode == "OFFSET_CORNERS":
            delta = max(1, size - 1) / count
            point = 0.5 * delta + i * delta
        else:
            point = i * (size / count) + 0.5 * (size / count) - 0.5
        points.append(min(size - 1, max(0, point)))
    return np.array(points)


def bilinear(x: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    for axis, count in ((-2, height), (-1, width)):
        columns = np.moveaxis(x.astype(np.float64), axis, -1)
        points = grid(x.shape[axis], count, mode)
        low = np.floor(points).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        x = np.moveaxis(columns[..., low] * (1 - (points - low)) + columns[..., high] * (points - low), -1, axis)
    return x


SIZE = st.integers(1, 9)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8)
@given(sizes=st.tuples(SIZE, SIZE, SIZE, SIZE))
def test_resize_samples_the_documented_grid(agree: Agree, mode: str, sizes: Any) -> None:
    high, wide, height, width = sizes
    x = normal(1, 2, 3, high, wide)
    expected = bilinear(x, height, width, mode)
    agree("resize_bilinear", expected, x=x, target_size_height=height, target_size_width=width, sampling_mode=mode)
    shape = {"shape": np.array([1, height, width], np.int32), "resized_dims": np.uint32(2)}
    agree("resize", expected, x=x, interpolation_mode="LINEAR", sampling_mode=mode, **shape)


@settings(max_examples=8)
@given(sizes=st.tuples(SIZE, SIZE), factors=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_upsampling_is_torchs(agree: Agree, sizes: tuple[int, int], factors: tuple[int, int]) -> None:
    x = torch.from_numpy(normal(1, 1, 2, *sizes))
    scale = dict(zip(("scale_factor_height", "scale_factor_width"), factors, strict=True))
    target = [size * factor for size, factor in zip(sizes, factors, strict=True)]
    agree("upsample_nearest_neighbor", F.interpolate(x, target).numpy(), x=x.numpy(), **scale)
    for corners in (False, True):
        expected = F.interpolate(x, target, mode="bilinear", align_corners=corners).numpy()
        agree("upsample_bilinear", expected, x=x.numpy(), align_corners=corners, **scale)


@settings(max_examples=8)
@given(sizes=st.tuples(SIZE, SIZE, SIZE, SIZE))
def test_nearest_resize_is_torchs(agree: Agree, sizes: Any) -> None:
    high, wide, height, width = sizes
    x = torch.from_numpy(normal(1, 1, 2, high, wide))
    expected = F.interpolate(x, (height, width)).numpy()
    agree("resize_nearest_neighbor", expected, x=x.numpy(), target_size_height=height, target_size_width=width)
    shape = {"shape": np.array([height, width], np.int32), "resized_dims": np.uint32(2)}
    agree("resize", expected, x=x.numpy(), interpolation_mode="NEAREST_NEIGHBOR", **shape)


def test_resize_keeps_a_size_of_zero(agree: Agree) -> None:
    x = normal(1, 1, 2, 4, 4)
    shape = {"shape": np.array([0, 8], np.int32), "resized_dims": np.uint32(2), "sampling_mode": "UNALIGN_CORNERS"}
    agree("resize", bilinear(x, 4, 8, "UNALIGN_CORNERS"), x=x, **shape)


def test_nearest_resize_with_another_grid_is_refused(evaluate: Callable[..., Any]) -> None:
    shape = {"shape": np.array([8, 8], np.int32), "resized_dims": np.uint32(2), "sampling_mode": "ALIGN_CORNERS"}
    with pytest.raises(PackageError, match="sampling_mode must be DEFAULT for NEAREST_NEIGHBOR, got 'ALIGN_CORNERS'"):
        evaluate("resize", infer=False, x=normal(1, 1, 2, 4, 4), interpolation_mode="NEAREST_NEIGHBOR", **shape)


def test_crop_removes_the_borders(agree: Agree) -> None:
    x = normal(1, 1, 2, 6, 7)
    agree("crop", x[..., 1:4, 3:6], x=x, crop_height=[1, 2], crop_width=[3, 1])


@pytest.mark.parametrize("mode", ["STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS", "DEFAULT"])
def test_crop_resize_of_the_whole_image_is_resize(agree: Agree, mode: str) -> None:
    x = normal(1, 2, 3, 5, 6)
    expected = bilinear(x, 4, 8, mode)
    target = {"target_height": 4, "target_width": 8, "sampling_mode": mode}
    boxes = np.array([[0, 0, 4, 5]] * 2, np.float32)
    indices = np.array([0, 1], np.int32)
    agree("crop_resize", expected, x=x, boxes=boxes, box_indices=indices, **target)
    roi = np.array([0, 0, 0, 4, 5], np.float32).reshape(1, 1, 5, 1, 1)
    agree("crop_resize", expected[None, :1], "iOS16", x=x[:1], roi=roi, **target)
    agree("crop_resize", expected[None], "iOS15", x=x, roi=roi[:, :, 1:], **target)


def test_crop_resize_reads_every_layout_of_boxes(agree: Agree) -> None:
    x = normal(1, 1, 2, 5, 6)
    expected = x[:, :, 1:4, 2:6]
    layouts = {
        "CORNERS_HEIGHT_FIRST": [1, 2, 3, 5], "CORNERS_WIDTH_FIRST": [2, 1, 5, 3],
        "CENTER_SIZE_HEIGHT_FIRST": [2, 3.5, 2, 3], "CENTER_SIZE_WIDTH_FIRST": [3.5, 2, 3, 2],
    }  # fmt: skip
    target = {"target_height": 3, "target_width": 4, "sampling_mode": "STRICT_ALIGN_CORNERS"}
    index = np.array([0], np.int32)
    for layout, box in layouts.items():
        boxes = np.array([box], np.float32)
        agree("crop_resize", expected, x=x, boxes=boxes, box_indices=index, box_coordinate_mode=layout, **target)
    scaled = np.array([[1 / 4, 2 / 5, 3 / 4, 1]], np.float32)
    agree("crop_resize", expected, x=x, boxes=scaled, box_indices=index, normalized_coordinates=True, **target)


@pytest.mark.parametrize("padding", ["constant", "border", "reflection"])
@pytest.mark.parametrize("corners", [False, True])
def test_resample_is_torchs_grid_sample(agree: Agree, padding: str, corners: bool) -> None:
    x, points = normal(1, 2, 3, 5, 6), normal(2, 2, 4, 4, 2)
    torch_mode = {"constant": "zeros"}.get(padding, padding)
    expected = F.grid_sample(torch.from_numpy(x), torch.from_numpy(points), "bilinear", torch_mode, corners).numpy()
    shared = {
        "x": x, "sampling_mode": "bilinear", "padding_mode": padding, "padding_value": np.float32(0),
        "align_corners": corners,
    }  # fmt: skip
    agree("resample", expected, coordinates=points, coordinates_mode="normalized_minus_one_to_one", **shared)
    unit = ((points + 1) / 2).astype(np.float32)
    pixels = unit * [5, 4] if corners else unit * [6, 5] - 0.5
    agree("resample", expected, coordinates=pixels.astype(np.float32), coordinates_mode="unnormalized", **shared)
