"""Operations along axes: reductions, softmax, normalizations, cumulative sums and order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..binding import Kind, Parameters, Step

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]
"""(tensor, axes, keep the axes) -> reduced tensor."""


def _reduction(function: Reduce) -> Kind:
    def bind(p: Parameters) -> Step:
        axes, keep = p.integers("axes", ()), bool(p.integer("keep_dims", 0))
        return lambda x: function(x, axes or tuple(range(x.ndim)), keep)

    return Kind(("x",), bind)


def _exact(x: Tensor) -> Tensor:
    """Returns integers as float64, in which sums of int32 are exact."""
    return x if x.dtype.is_floating_point else x.to(torch.float64)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


def _arg(function: Callable[..., Tensor]) -> Kind:
    def bind(p: Parameters) -> Step:
        axis, keep = p.integer("axis", -1), bool(p.integer("keep_dims", 0))
        return lambda x: function(x, axis, keep)

    return Kind(("x",), bind)


def _softmax(p: Parameters) -> Step:
    axis = p.integer("axis", -1)

    def over_rows(x: Tensor) -> Tensor:
        # over another axis than the last, torch's own takes 1.35 times as long (24 heads of 1024 x 1024)
        if not x.numel():
            return torch.softmax(x, axis)
        weights = (x - x.amax(axis, keepdim=True)).exp_()
        return weights.div_(weights.sum(axis, keepdim=True))

    over_last = axis in (-1, p.output.rank - 1)
    return (lambda x: torch.softmax(x, axis)) if over_last else over_rows


def _layer_norm(p: Parameters) -> Step:
    axes, epsilon = p.integers("axes", ()), p.number("epsilon", 1e-5)
    gamma, beta = p.tensor("gamma"), p.tensor("beta")

    def step(x: Tensor) -> Tensor:
        source = sorted(axis % x.ndim for axis in axes) or list(range(x.ndim))
        last = list(range(x.ndim - len(source), x.ndim))
        # No copy for a channels-last tensor: the channel axis is already the innermost in memory.
        moved = x.movedim(source, last)
        return F.layer_norm(moved, moved.shape[last[0] :], gamma, beta, epsilon).movedim(last, source)

    return step


def _batch_norm(p: Parameters) -> Step:
    mean, variance = p.required("mean"), p.required("variance")
    gamma, beta, epsilon = p.tensor("gamma"), p.tensor("beta"), p.number("epsilon", 1e-5)
    return lambda x: F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _instance_norm(p: Parameters) -> Step:
    gamma, beta, epsilon = p.tensor("gamma"), p.tensor("beta"), p.number("epsilon", 1e-5)

    def step(x: Tensor) -> Tensor:
        columns = x.flatten(2)  # (B, C, N)
        normal = F.layer_norm(columns, columns.shape[2:], eps=epsilon)  # torch's instance_norm refuses N = 1
        if gamma is not None:
            normal = normal * gamma[:, None].expand(x.shape[1], 1)
        if beta is not None:
            normal = normal + beta[:, None].expand(x.shape[1], 1)
        return normal.view(x.shape)

    return step


def _l2_norm(p: Parameters) -> Step:
    epsilon = p.number("epsilon", 1e-6)
    return lambda x: x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _local_response_norm(p: Parameters) -> Step:
    size = p.integer("size")
    alpha, beta, k = p.number("alpha", 1e-4), p.number("beta", 0.75), p.number("k", 1.0)
    return lambda x: F.local_response_norm(x, size, alpha, beta, k)


def _cumsum(p: Parameters) -> Step:
    axis, exclusive, reverse = p.integer("axis", 0), p.integer("exclusive", 0), p.integer("reverse", 0)

    def step(x: Tensor) -> Tensor:
        if reverse:
            x = x.flip(axis)
        total = torch.cumsum(x, axis)
        if exclusive:
            total = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), total.narrow(axis, 0, x.shape[axis] - 1)], axis)
        return total.flip(axis) if reverse else total

    return step


def _topk(p: Parameters) -> Step:
    count, axis, ascending = p.integer("k", 1), p.integer("axis", -1), bool(p.integer("ascending", 0))

    def step(x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        wanted = x.shape[axis] if count == -1 else count
        if not 0 <= wanted <= x.shape[axis]:
            raise ValueError(f"k must be at most {x.shape[axis]}, got {count}")
        values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
        values, indices = values.narrow(axis, 0, wanted), indices.narrow(axis, 0, wanted)
        return (values, indices) if len(p.operation.outputs) == 2 else values

    return step


def _argsort(p: Parameters) -> Step:
    axis, ascending = p.integer("axis", -1), bool(p.integer("ascending", 0))
    return lambda x: torch.sort(x, dim=axis, descending=not ascending, stable=True)[1]


REDUCTIONS: dict[str, Kind] = {
    "argsort": Kind(("x",), _argsort),
    "batch_norm": Kind(("x",), _batch_norm),
    "cumsum": Kind(("x",), _cumsum),
    "instance_norm": Kind(("x",), _instance_norm),
    "l2_norm": Kind(("x",), _l2_norm),
    "layer_norm": Kind(("x",), _layer_norm),
    "local_response_norm": Kind(("x",), _local_response_norm),
    "reduce_argmax": _arg(torch.argmax),
    "reduce_argmin": _arg(torch.argmin),
    "reduce_l1_norm": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: _exact(x).square().sum(axes, keep).sqrt()),
    "reduce_log_sum": _reduction(lambda x, axes, keep: _exact(x).sum(axes, keep).log()),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: torch.logsumexp(_exact(x), axes, keep)),
    "reduce_max": _reduction(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: torch.mean(_exact(x), axes, keep)),
    "reduce_min": _reduction(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "reduce_prod": _reduction(_prod),
    "reduce_sum": _reduction(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "softmax": Kind(("x",), _softmax),
    "topk": Kind(("x",), _topk, fresh=False),
}
"""The kinds along axes, by MIL name."""
