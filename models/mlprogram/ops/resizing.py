"""Operations that sample images at other positions: upsampling, resizing, crops and resampling at coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..binding import Kind, Parameters, Shape, Shapes, Step

SAMPLING_MODES = ("DEFAULT", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "OFFSET_CORNERS", "UNALIGN_CORNERS")
"""The placements of the sampled points on an axis, as the reference of `resize_bilinear` defines them."""


def _grid(size: float, count: int, mode: str) -> Tensor:
    """Returns the `count` points of an axis of `size` positions that are sampled, in float64."""
    steps = torch.arange(count, dtype=torch.float64)
    if mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * size / count - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * max(1, size - 1) / count
    elif mode == "DEFAULT":
        points = steps * size / count
    elif mode == "ALIGN_CORNERS" and count == 1:
        points = torch.tensor([(size - 1) / 2], dtype=torch.float64)
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * (size - 1) / max(1, count - 1)
    else:
        raise ValueError(f"sampling_mode must be one of {', '.join(SAMPLING_MODES)}, got {mode!r}")
    return points.clamp(0, size - 1)


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """Interpolates `x` linearly along `axis` at `points`."""
    low = points.floor().to(torch.long)
    share = (points - low).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)


def _bilinear(x: Tensor, sizes: Sequence[int], mode: str) -> Tensor:
    """Resizes the last axes of `x` to `sizes`. An axis that keeps its size and its grid is left alone."""
    for axis, count in zip(range(-len(sizes), 0), sizes, strict=True):
        points = _grid(x.shape[axis], count, mode)
        if len(points) != x.shape[axis] or not torch.equal(points, torch.arange(count, dtype=torch.float64)):
            x = _linear(x, axis, points)
    return x


def _nearest(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Resizes the last axes of `x` to `sizes`: position i takes floor(i * size / new size)."""
    for axis, count in zip(range(-len(sizes), 0), sizes, strict=True):
        if count != x.shape[axis]:
            x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


def _scaled_sizes(p: Parameters, shape: Sequence[int]) -> list[int]:
    factors = [p.number(f"scale_factor_{name}", 1.0) for name in ("height", "width")]
    return [floor(size * factor) for size, factor in zip(shape[-2:], factors, strict=True)]


def _target_sizes(p: Parameters) -> list[int]:
    return [p.integer(f"target_size_{name}", 1) for name in ("height", "width")]


def _upsample_nearest(p: Parameters) -> Step:
    return lambda x: _nearest(x, _scaled_sizes(p, x.shape))


def _upsample_bilinear(p: Parameters) -> Step:
    corners = bool(p.integer("align_corners", 1))
    half = bool(p.integer("half_pixel_centers", int(not corners)))
    if corners and half:
        raise ValueError("align_corners and half_pixel_centers must not both be true")
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    return lambda x: _bilinear(x, _scaled_sizes(p, x.shape), mode)


def _upsample_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [(*shapes["x"][0][:-2], *_scaled_sizes(p, shapes["x"][0]))]


def _resize_nearest(p: Parameters) -> Step:
    sizes = _target_sizes(p)
    return lambda x: _nearest(x, sizes)


def _resize_bilinear(p: Parameters) -> Step:
    sizes, mode = _target_sizes(p), p.text("sampling_mode", "DEFAULT")
    return lambda x: _bilinear(x, sizes, mode)


def _target_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [(*shapes["x"][0][:-2], *_target_sizes(p))]


def _resize(p: Parameters) -> Step:
    linear, mode = p.text("interpolation_mode", "LINEAR") == "LINEAR", p.text("sampling_mode", "DEFAULT")
    if not linear and mode != "DEFAULT":
        raise ValueError(f"sampling_mode must be DEFAULT for NEAREST_NEIGHBOR, got {mode!r}")

    def step(x: Tensor) -> Tensor:
        sizes = _resized(p, x.shape)
        return _bilinear(x, sizes, mode) if linear else _nearest(x, sizes)

    return step


def _resized(p: Parameters, shape: Sequence[int]) -> list[int]:
    """Returns the new sizes of the last axes. A 0 keeps the size."""
    count = p.integer("resized_dims")
    wanted = p.integers("shape")[-count:]
    return [size or shape[i - count] for i, size in enumerate(wanted)]


def _resize_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    shape = shapes["x"][0]
    return [(*shape[: len(shape) - p.integer("resized_dims")], *_resized(p, shape))]


def _crop(p: Parameters) -> Step:
    (top, bottom), (left, right) = p.integers("crop_height"), p.integers("crop_width")
    return lambda x: x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _corners(boxes: Tensor, mode: str) -> Tensor:
    """Returns boxes (N, 4) as (top, left, bottom, right)."""
    if mode.endswith("WIDTH_FIRST"):
        boxes = boxes[:, [1, 0, 3, 2]]
    if mode.startswith("CENTER_SIZE"):
        center, half = boxes[:, :2], boxes[:, 2:] / 2
        boxes = torch.cat([center - half, center + half], 1)
    return boxes


def _crop_resize(p: Parameters) -> Step:
    """Samples boxes of images. iOS15 and iOS16 have `roi` (N, 1, 4 or 5, 1, 1), iOS17 has `boxes` and `box_indices`."""
    height, width = p.integer("target_height", 1), p.integer("target_width", 1)
    normalized, scale = p.integer("normalized_coordinates", 0), p.number("spatial_scale", 1.0)
    layout, mode = p.text("box_coordinate_mode", "CORNERS_HEIGHT_FIRST"), p.text("sampling_mode", "DEFAULT")
    fill, is_roi = p.number("pad_value", 0.0), "roi" in p.operation.inputs
    given, boxes = p.tensor("box_indices"), p.required("roi" if is_roi else "boxes")

    def crop(image: Tensor, box: Tensor) -> Tensor:
        top, left, bottom, right = (box.to(torch.float64) * scale).tolist()
        if normalized:
            top, bottom = top * (image.shape[-2] - 1), bottom * (image.shape[-2] - 1)
            left, right = left * (image.shape[-1] - 1), right * (image.shape[-1] - 1)
        rows = top + _grid(bottom - top + 1, height, mode)
        columns = left + _grid(right - left + 1, width, mode)
        inside = [(at >= 0) & (at <= size - 1) for at, size in zip((rows, columns), image.shape[-2:], strict=True)]
        rows, columns = rows.clamp(0, image.shape[-2] - 1), columns.clamp(0, image.shape[-1] - 1)
        found = _linear(_linear(image, -2, rows), -1, columns)
        return torch.where(inside[0][:, None] & inside[1], found, fill)

    def step(x: Tensor) -> Tensor:
        flat = boxes.reshape(len(boxes), -1)
        corners = _corners(flat[:, -4:], layout)
        if is_roi and flat.shape[1] == 4:
            return torch.stack([crop(x, box) for box in corners])  # (N, B, C, H, W)
        indices = flat[:, 0] if is_roi else torch.arange(len(flat)) if given is None else given
        found = [crop(x[int(image)], box) for image, box in zip(indices, corners, strict=True)]
        return torch.stack(found)[:, None] if is_roi else torch.stack(found)

    return step


def _crop_resize_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    batch, channels = shapes["x"][0][:2]
    target = (channels, p.integer("target_height", 1), p.integer("target_width", 1))
    if "roi" in shapes:
        count, _, values = shapes["roi"][0][:3]
        return [(count, batch if values == 4 else 1, *target)]
    return [(shapes["boxes"][0][0], *target)]


_PADDING_MODES = {"constant": "zeros", "border": "border", "reflection": "reflection"}


def _resample(p: Parameters) -> Step:
    """Samples (B, C, H, W) at `coordinates` (B, H2, W2, 2), each x and y."""
    mode, padding = p.text("sampling_mode", "bilinear"), p.text("padding_mode", "constant")
    fill, space = p.number("padding_value", 0.0), p.text("coordinates_mode", "normalized_minus_one_to_one")
    corners = bool(p.integer("align_corners", 0))
    if padding not in _PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding!r}")

    def step(x: Tensor, coordinates: Tensor) -> Tensor:
        grid = coordinates.to(torch.float32)
        size = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float32)
        if space == "unnormalized":
            grid = grid * 2 / (size - 1) - 1 if corners else (grid * 2 + 1) / size - 1
        elif space == "normalized_zero_to_one":
            grid = grid * 2 - 1
        offset = fill if padding == "constant" else 0.0
        return F.grid_sample(x - offset, grid, mode, _PADDING_MODES[padding], corners) + offset

    return step


def _resample_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [(*shapes["x"][0][:2], *shapes["coordinates"][0][1:3])]


RESIZING: dict[str, Kind] = {
    "crop": Kind(("x",), _crop, fresh=False, moves=True),
    "crop_resize": Kind(("x",), _crop_resize, grows=_crop_resize_shape),
    "resample": Kind(("x", "coordinates"), _resample, grows=_resample_shape),
    "resize": Kind(("x",), _resize, fresh=False, grows=_resize_shape),
    "resize_bilinear": Kind(("x",), _resize_bilinear, fresh=False, grows=_target_shape),
    "resize_nearest_neighbor": Kind(("x",), _resize_nearest, fresh=False, moves=True, grows=_target_shape),
    "upsample_bilinear": Kind(("x",), _upsample_bilinear, fresh=False, grows=_upsample_shape),
    "upsample_nearest_neighbor": Kind(("x",), _upsample_nearest, fresh=False, moves=True, grows=_upsample_shape),
}
"""The kinds that sample images, by MIL name."""
