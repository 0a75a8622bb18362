"""Operations that choose places by computed indices: gathers, scatters, one-hot vectors, bands and nonzero elements."""

from __future__ import annotations

import torch
from torch import Tensor

from ..binding import TORCH_TYPES, Kind, Parameters, Shape, Shapes, Step


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Returns indices as int64, negative ones counted from the end.

    Raises:
        IndexError: an index is outside the axis.
    """
    indices = indices.to(torch.int64)
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -size or high >= size:
            raise IndexError(f"indices must be within an axis of size {size}, got {low if low < -size else high}")
    return torch.where(indices < 0, indices + size, indices)


def _gather(p: Parameters) -> Step:
    axis, batch_dims = p.integer("axis", 0), p.integer("batch_dims", 0)

    def step(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.ndim
        chosen = _wrapped(indices, x.shape[at])
        if not batch_dims:
            return x.index_select(at, chosen.reshape(-1)).reshape((*x.shape[:at], *chosen.shape, *x.shape[at + 1 :]))
        batch = x.shape[:batch_dims]
        parts = zip(x.reshape(-1, *x.shape[batch_dims:]), chosen.reshape(-1, *chosen.shape[batch_dims:]), strict=True)
        inner = at - batch_dims
        found = [part.index_select(inner, some.reshape(-1)) for part, some in parts]
        shape = (*batch, *x.shape[batch_dims:at], *chosen.shape[batch_dims:], *x.shape[at + 1 :])
        return torch.stack(found).reshape(shape)

    return step


def _gather_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, indices = shapes["x"][0], shapes["indices"][0]
    axis = p.integer("axis", 0) % len(x)
    return [(*x[:axis], *indices[p.integer("batch_dims", 0) :], *x[axis + 1 :])]


def _gather_along_axis(p: Parameters) -> Step:
    axis = p.integer("axis", 0)
    return lambda x, indices: torch.take_along_dim(x, _wrapped(indices, x.shape[axis]), axis)


def _along_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, indices = shapes["x"][0], shapes["indices"][0]
    axis = p.integer("axis", 0) % len(x)
    if any(a != b for i, (a, b) in enumerate(zip(x, indices, strict=True)) if i != axis and 1 not in (a, b)):
        raise ValueError(f"indices must have the shape of x but for axis {axis}, got {list(indices)} for {list(x)}")
    sizes = [b if i == axis else max(a, b) for i, (a, b) in enumerate(zip(x, indices, strict=True))]
    return [tuple(sizes)]


def _places(indices: Tensor, shape: torch.Size, batch_dims: int = 0) -> tuple[Tensor, ...]:
    """Returns the index of each axis that the last axis of `indices` lists, after one for each batch axis."""
    count = indices.ndim - 1
    batch = [
        torch.arange(indices.shape[i]).reshape([-1 if i == axis else 1 for axis in range(count)])
        for i in range(batch_dims)
    ]
    return (*batch, *(_wrapped(part, shape[batch_dims + i]) for i, part in enumerate(indices.unbind(-1))))


def _gather_nd(p: Parameters) -> Step:
    batch_dims = p.integer("batch_dims", 0)
    return lambda x, indices: x[_places(indices, x.shape, batch_dims)]


def _gather_nd_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    x, indices = shapes["x"][0], shapes["indices"][0]
    return [(*indices[:-1], *x[p.integer("batch_dims", 0) + indices[-1] :])]


def _scattered(p: Parameters, data: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    """Returns a copy of `data` with `updates` combined into the elements at the flat positions `places`."""
    mode = p.text("mode", "add")
    flat, at, new = data.reshape(-1).clone(), places.reshape(-1), updates.reshape(-1)
    if at.numel() != new.numel():
        raise ValueError(f"updates must have {at.numel()} elements, got {new.numel()}")
    if mode == "update":
        flat[at] = new
    elif mode in ("add", "sub"):
        flat.index_add_(0, at, new, alpha=1 if mode == "add" else -1)
    elif mode == "div":
        flat = flat / torch.ones_like(flat).scatter_reduce_(0, at, new, "prod")
    elif mode in ("mul", "max", "min"):
        flat.scatter_reduce_(0, at, new, {"mul": "prod", "max": "amax", "min": "amin"}[mode])
    else:
        raise ValueError(f"mode must be add, div, max, min, mul, sub or update, got {mode!r}")
    return flat.reshape(data.shape)


def _numbered(data: Tensor) -> Tensor:
    """Returns the flat position of each element."""
    return torch.arange(data.numel()).reshape(data.shape)


def _scatter(p: Parameters) -> Step:
    axis = p.integer("axis", 0)

    def step(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        chosen = _wrapped(indices, data.shape[axis]).reshape(-1)
        return _scattered(p, data, _numbered(data).index_select(axis, chosen), updates)

    return step


def _scatter_along_axis(p: Parameters) -> Step:
    axis = p.integer("axis", 0)

    def step(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = torch.take_along_dim(_numbered(data), _wrapped(indices, data.shape[axis]), axis)
        return _scattered(p, data, places, updates)

    return step


def _scatter_nd(p: Parameters) -> Step:
    def step(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return _scattered(p, data, _numbered(data)[_places(indices, data.shape)], updates)

    return step


def _one_hot(p: Parameters) -> Step:
    size, axis = p.integer("one_hot_vector_size"), p.integer("axis", -1)
    on, off = p.number("on_value", 1.0), p.number("off_value", 0.0)
    dtype = TORCH_TYPES[p.output.dtype]

    def step(indices: Tensor) -> Tensor:
        at = axis % (indices.ndim + 1)
        shape = [-1 if i == at else 1 for i in range(indices.ndim + 1)]
        hit = indices.unsqueeze(at) == torch.arange(size).reshape(shape)
        return torch.where(hit, on, off).to(dtype)

    return step


def _one_hot_shape(p: Parameters, shapes: Shapes) -> list[Shape]:
    indices = shapes["indices"][0]
    at = p.integer("axis", -1) % (len(indices) + 1)
    return [(*indices[:at], p.integer("one_hot_vector_size"), *indices[at:])]


def _band_part(p: Parameters) -> Step:
    lower, upper = p.integer("lower", -1), p.integer("upper", -1)

    def step(x: Tensor) -> Tensor:
        below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
        kept = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
        return torch.where(kept, x, torch.zeros((), dtype=x.dtype))

    return step


def _non_zero(p: Parameters) -> Step:
    return lambda x: torch.nonzero(x)


INDEXING: dict[str, Kind] = {
    "band_part": Kind(("x",), _band_part),
    "gather": Kind(("x", "indices"), _gather, moves=True, grows=_gather_shape),
    "gather_along_axis": Kind(("x", "indices"), _gather_along_axis, moves=True, grows=_along_shape),
    "gather_nd": Kind(("x", "indices"), _gather_nd, fresh=False, moves=True, grows=_gather_nd_shape),
    "non_zero": Kind(("x",), _non_zero),
    "one_hot": Kind(("indices",), _one_hot, grows=_one_hot_shape),
    "scatter": Kind(("data", "indices", "updates"), _scatter),
    "scatter_along_axis": Kind(("data", "indices", "updates"), _scatter_along_axis),
    "scatter_nd": Kind(("data", "indices", "updates"), _scatter_nd),
}
"""The kinds that choose places by indices, by MIL name."""
