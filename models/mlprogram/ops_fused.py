"""Kinds that no program names: chains of operations as one, see `fusion`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .binding import Kind, Parameters, Step

FEED_FORWARD, FEED_FORWARD_ADD, ATTENTION = "fused feed-forward", "fused feed-forward + add", "fused attention"

HIDDEN_BYTES = 2**21
"""Of hidden values at a time: they stay in a core's cache, and their memory is not asked for anew.

Measured at 384 to 3072 channels, ratio to one pass over all positions: 0.76 to 0.97; half and twice that are alike."""

LEAST_ROWS = 256
"""Positions at a time, at least: fewer rows make slow matrix products."""


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (BHW, C); a view where the tensor is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _feed_forward(p: Parameters) -> Step:
    up, down = (p.required(f"weight_{i}").flatten(1).T for i in (1, 2))  # (C, hidden), (hidden, C_out)
    bias_up, bias_down = (_bias(p, f"bias_{i}", weight) for i, weight in ((1, up), (2, down)))
    at_once = max(LEAST_ROWS, HIDDEN_BYTES // (4 * up.shape[1]))

    def step(x: Tensor, y: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        source, other = rows(x), None if y is None else rows(y)
        result = torch.empty(len(source), down.shape[1])
        hidden = torch.empty(min(at_once, len(source)), up.shape[1])
        for start in range(0, len(source), at_once):
            part = slice(start, start + at_once)
            inside = torch.addmm(bias_up, source[part], up, out=hidden[: len(source[part])])
            torch.addmm(bias_down, torch.ops.aten.gelu_(inside), down, out=result[part])
            if other is not None:
                result[part] += other[part]
        return result.view(batch, height, width, -1).permute(0, 3, 1, 2)  # (B, C_out, H, W), channels-last

    return step


def _bias(p: Parameters, name: str, weight: Tensor) -> Tensor:
    bias = p.tensor(name)
    return torch.zeros(weight.shape[1]) if bias is None else bias


def _attention(p: Parameters) -> Step:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (B, heads, N, head_dim) each; without the copies it is 6 times slower
        query, key, value = (x.mT.contiguous() for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0).mT

    return step


FUSED_KINDS: dict[str, Kind] = {
    FEED_FORWARD: Kind(("x",), _feed_forward),
    FEED_FORWARD_ADD: Kind(("x", "y"), _feed_forward),
    ATTENTION: Kind(("query", "key", "value"), _attention),
}
