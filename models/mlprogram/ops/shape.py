"""Operations that move values without changing them: reshapes, slices, joins, padding, repetition and filling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..binding import TORCH_TYPES, Kind, Parameters, Shape, Shapes, Step


def _reshape(p: Parameters) -> Step:
    wanted = p.integers("shape")

    def step(x: Tensor) -> Tensor:
        shift = x.ndim - len(wanted)  # a 0 keeps the size of the axis at the same distance from the end
        shape = [size or (x.shape[i + shift] if i + shift >= 0 else 1) for i, size in enumerate(wanted)]
        return x.reshape(shape)

    return step


def _reshape_like(p: Parameters) -> Step:
    begins, ends, masks = p.integers("begins"), p.integers("ends"), p.integers("end_masks")

    def step(x: Tensor, *references: Tensor) -> Tensor:
        parts = zip(references, begins, ends, masks, strict=True)
        return x.reshape([size for r, begin, end, mask in parts for size in r.shape[begin : None if mask else end]])

    return step


def _transpose(p: Parameters) -> Step:
    axes = p.integers("perm")
    return lambda x: x.permute(axes)


def _expand_dims(p: Parameters) -> Step:
    axes = p.integers("axes")

    def step(x: Tensor) -> Tensor:
        rank = x.ndim + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return step


def _squeeze(p: Parameters) -> Step:
    axes = p.integers("axes", ())

    def step(x: Tensor) -> Tensor:
        return x.squeeze(axes or tuple(range(x.ndim)))  # torch leaves an axis of another size than 1 alone too

    return step


def _flatten2d(p: Parameters) -> Step:
    axis = p.integer("axis", 1)
    return lambda x: x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _shape(p: Parameters) -> Step:
    return lambda x: torch.tensor(x.shape, dtype=torch.int32)


def _split(p: Parameters) -> Step:
    axis, sizes = p.integer("axis"), p.integers("split_sizes", ())
    if sizes:
        return lambda x: x.split(sizes, axis)
    parts = p.integer("num_splits")

    def step(x: Tensor) -> tuple[Tensor, ...]:
        if parts < 1 or x.shape[axis] % parts:
            raise ValueError(f"axis {axis} must be divisible by {parts}, got shape {tuple(x.shape)}")
        return x.split(x.shape[axis] // parts, axis)

    return step


def _concat(p: Parameters) -> Step:
    axis = p.integer("axis")
    if not p.integer("interleave", 0):
        return lambda *values: torch.cat(values, axis) if values[0].ndim else torch.stack(values)

    def interleave(*values: Tensor) -> Tensor:
        start = axis % values[0].ndim
        return torch.stack(values, start + 1).flatten(start, start + 1)

    return interleave


def _concat_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    values, axis = shapes["values"], p.integer("axis")
    if not values[0]:
        return [(len(values),)]
    joined = list(values[0])
    joined[axis] = sum(shape[axis] for shape in values)
    return [tuple(joined)]


def _stack(p: Parameters) -> Step:
    axis = p.integer("axis")
    return lambda *values: torch.stack(values, axis)


def _stack_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    first, axis = shapes["values"][0], p.integer("axis")
    axis %= len(first) + 1
    return [(*first[:axis], len(shapes["values"]), *first[axis:])]


Slices = list[tuple[range, bool]]
"""(indices, whether the axis is dropped) for each axis."""


def _slices(p: Parameters, shape: Sequence[int]) -> Slices:
    """Returns what `begin`, `end`, `stride` and the three masks select from a tensor of `shape`."""
    begin, end = p.integers("begin"), p.integers("end")
    flags = [p.integers(name, [0] * len(begin)) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    entries = list(zip(begin, end, p.integers("stride", [1] * len(begin)), *flags, strict=True))
    if len(entries) != len(shape):
        raise ValueError(f"must have indices for {len(shape)} axes, got {len(entries)}")
    chosen: Slices = []
    for size, (first, last, stride, from_start, to_end, drop) in zip(shape, entries, strict=True):
        if drop:
            at = 0 if from_start else first + size if first < 0 else first
            if not 0 <= at < size:
                raise ValueError(f"begin must be inside an axis of size {size}, got {first}")
            chosen.append((range(at, at + 1), True))
            continue
        bounds = slice(None if from_start else first, None if to_end else last, stride)
        chosen.append((range(*bounds.indices(size)), False))
    return chosen


def _sliced(x: Tensor, slices: Slices) -> Tensor:
    """Returns the selected part, a view if no stride is negative."""
    for axis, (indices, _) in enumerate(slices):
        if indices.step > 0:
            x = x[(slice(None),) * axis + (slice(indices.start, indices.stop, indices.step),)]
        else:
            x = x.index_select(axis, torch.tensor(indices, dtype=torch.long))
    return x.squeeze([axis for axis, (_, drop) in enumerate(slices) if drop])


def _slice_by_index(p: Parameters) -> Step:
    return lambda x: _sliced(x, _slices(p, x.shape))


def _slice_update(p: Parameters) -> Step:
    def step(x: Tensor, update: Tensor) -> Tensor:
        slices, result = _slices(p, x.shape), x.clone()
        if all(indices.step > 0 for indices, _ in slices):
            _sliced(result, slices).copy_(update)
            return result
        places = _sliced(torch.arange(x.numel()).reshape(x.shape), slices)
        result = result.contiguous()
        result.view(-1)[places.reshape(-1)] = update.reshape(-1)
        return result

    return step


def _slice_by_size(p: Parameters) -> Step:
    begin, sizes = p.integers("begin"), p.integers("size")

    def step(x: Tensor) -> Tensor:
        for axis, (first, count) in enumerate(zip(begin, sizes, strict=True)):
            first = first + x.shape[axis] if first < 0 else first
            x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
        return x

    return step


_NUMPY_MODES = {"reflect": "reflect", "replicate": "edge"}


def _pad(p: Parameters) -> Step:
    amounts, mode, fill = p.integers("pad"), p.text("mode", "constant"), p.number("constant_val", 0.0)
    if mode != "constant" and mode not in _NUMPY_MODES:
        raise ValueError(f"mode must be constant, reflect or replicate, got {mode!r}")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))

    def step(x: Tensor) -> Tensor:
        if mode == "constant":
            flat = [amount for pair in reversed(pairs) for amount in pair]
            return torch.nn.functional.pad(x, flat, value=fill)
        for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
            if before or after:
                source = np.pad(np.arange(x.shape[axis]), (before, after), mode=_NUMPY_MODES[mode])  # type: ignore[call-overload]
                x = x.index_select(axis, torch.from_numpy(source))
        return x

    return step


def _pad_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    shape, amounts = shapes["x"][0], p.integers("pad")
    before = len(shape) - len(amounts) // 2
    added = [0] * before + [sum(pair) for pair in zip(amounts[::2], amounts[1::2], strict=True)]
    return [tuple(size + extra for size, extra in zip(shape, added, strict=True))]


def _tile(p: Parameters) -> Step:
    repeats = p.integers("reps")
    return lambda x: x.repeat(repeats)


def _tile_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [tuple(size * count for size, count in zip(shapes["x"][0], p.integers("reps"), strict=True))]


def _fill(p: Parameters) -> Step:
    value, dtype = p.number("value", 0.0), TORCH_TYPES[p.output.dtype]
    shape = p.integers("shape")
    return lambda: torch.full(shape, value, dtype=torch.float64).to(dtype) if shape else torch.tensor(value)


def _fill_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    return [p.integers("shape")]


def _fill_like(p: Parameters) -> Step:
    value, dtype = p.number("value", 0.0), TORCH_TYPES[p.output.dtype]
    return lambda ref_tensor: torch.full(ref_tensor.shape, value, dtype=torch.float64).to(dtype)


def _range_1d(p: Parameters) -> Step:
    ends = [p.required(name).reshape(()).item() for name in ("start", "end", "step")]
    dtype = TORCH_TYPES[p.output.dtype]
    return lambda: torch.from_numpy(np.arange(*ends)).to(dtype)


def _range_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    start, end, step = (p.required(name).reshape(()).item() for name in ("start", "end", "step"))
    return [(max(0, int(np.ceil((end - start) / step))),)]


def _reverse(p: Parameters) -> Step:
    axes = p.integers("axes", ())
    return lambda x: x.flip(axes or tuple(range(x.ndim)))


def _reverse_sequence(p: Parameters) -> Step:
    along, batch = p.integer("seq_axis", 0), p.integer("batch_axis", 0)

    def step(x: Tensor, lengths: Tensor) -> Tensor:
        size = x.shape[along]
        places = torch.arange(size).expand(len(lengths), size)
        counts = lengths.to(torch.long).reshape(-1, 1)
        places = torch.where(places < counts, counts - 1 - places, places)  # (batch, sequence)
        shape = [1] * x.ndim
        shape[batch], shape[along] = len(lengths), size
        ordered = places if batch % x.ndim < along % x.ndim else places.T
        return torch.take_along_dim(x, ordered.reshape(shape), along)

    return step


def _sliding_windows(p: Parameters) -> Step:
    axis, size, stride = p.integer("axis"), p.integer("size"), p.integer("stride", 1)
    return lambda x: x.unfold(axis, size, stride).movedim(-1, axis % x.ndim + 1).clone()


def _sliding_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    shape, axis, size = shapes["x"][0], p.integer("axis") % len(shapes["x"][0]), p.integer("size")
    count = (shape[axis] - size) // p.integer("stride", 1) + 1
    return [(*shape[:axis], count, size, *shape[axis + 1 :])]


def _depth_to_space(x: Tensor, block: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, block, block, channels // block**2, height, width)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * block, width * block)  # (B, C, H, W)


def _space_to_depth(x: Tensor, block: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // block, width // block)  # (B, C, H, W)


def _blocks(function: Callable[[Tensor, int], Tensor], name: str) -> Kind:
    return _moves(lambda p: lambda x: function(x, p.integer(name)))


def _space_to_batch(p: Parameters) -> Step:
    (high, wide), pads = p.integers("block_shape"), p.integers("paddings")

    def step(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (*pads[2:], *pads[:2]))
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height // high, high, width // wide, wide).permute(3, 5, 0, 1, 2, 4)
        return x.reshape(-1, channels, height // high, width // wide)  # (blocks x B, C, H, W)

    return step


def _space_to_batch_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    (high, wide), pads = p.integers("block_shape"), p.integers("paddings")
    batch, channels, height, width = shapes["x"][0]
    return [(batch * high * wide, channels, (height + sum(pads[:2])) // high, (width + sum(pads[2:])) // wide)]


def _batch_to_space(p: Parameters) -> Step:
    (high, wide), (top, bottom, left, right) = p.integers("block_shape"), p.integers("crops")

    def step(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        x = x.reshape(high, wide, count // (high * wide), channels, height, width).permute(2, 3, 4, 0, 5, 1)
        x = x.reshape(-1, channels, height * high, width * wide)  # (B, C, H, W)
        return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]

    return step


def _moves(bind: Callable[[Parameters], Step], operands: tuple[str, ...] = ("x",)) -> Kind:
    return Kind(operands, bind, fresh=False, moves=True)


def _copies(bind: Callable[[Parameters], Step], operands: tuple[str, ...], grows: Callable[..., list[Shape]]) -> Kind:
    return Kind(operands, bind, fresh=False, moves=True, grows=grows)


SHAPES: dict[str, Kind] = {
    "batch_to_space": _moves(_batch_to_space),
    "concat": _copies(_concat, ("values",), _concat_shape),
    "depth_to_space": _blocks(_depth_to_space, "block_size"),
    "expand_dims": _moves(_expand_dims),
    "fill": Kind((), _fill, grows=_fill_shape),
    "fill_like": Kind(("ref_tensor",), _fill_like),
    "flatten2d": _moves(_flatten2d),
    "identity": _moves(lambda p: lambda x: x),
    "pad": Kind(("x",), _pad, fresh=False, grows=_pad_shape),  # `constant_val` may need rounding
    "pixel_shuffle": _blocks(torch.nn.functional.pixel_shuffle, "upscale_factor"),
    "pixel_unshuffle": _blocks(torch.nn.functional.pixel_unshuffle, "downscale_factor"),
    "range_1d": Kind((), _range_1d, grows=_range_shape),
    "reshape": _moves(_reshape),
    "reshape_like": _moves(_reshape_like, ("x", "ref_tensors")),
    "reverse": _moves(_reverse),
    "reverse_sequence": _moves(_reverse_sequence, ("x", "lengths")),
    "shape": Kind(("x",), _shape),
    "slice_by_index": _moves(_slice_by_index),
    "slice_by_size": _moves(_slice_by_size),
    "slice_update": _moves(_slice_update, ("x", "update")),
    "sliding_windows": _copies(_sliding_windows, ("x",), _sliding_shape),
    "space_to_batch": _copies(_space_to_batch, ("x",), _space_to_batch_shape),
    "space_to_depth": _blocks(_space_to_depth, "block_size"),
    "split": _moves(_split),
    "squeeze": _moves(_squeeze),
    "stack": _copies(_stack, ("values",), _stack_shape),
    "tile": _copies(_tile, ("x",), _tile_shape),
    "transpose": _moves(_transpose),
}
"""The kinds that move values, by MIL name."""
