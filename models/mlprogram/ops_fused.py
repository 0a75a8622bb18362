"""Fused operations. They never occur in a saved program, and `fusion` puts them in place of chains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .binding import Kind, Parameters, Step
from .ops import dense, rows

FEED_FORWARD, FEED_FORWARD_ADD, ATTENTION = "fused feed-forward", "fused feed-forward + add", "fused attention"

ROWS_AT_ONCE = 4096
"""The number of positions whose hidden values are computed at a time, so that their memory is reused.

With 96 to 1536 channels, half or twice as many take up to 1.05 of the time, and 512 up to 1.25."""


def _feed_forward(p: Parameters) -> Step:
    up, down = (p.required(f"weight_{i}").flatten(1) for i in (1, 2))  # (hidden, C), (C_out, hidden)
    outputs = len(down)
    widen, narrow = dense(up, p.tensor("bias_1"), gelu=True), dense(down, p.tensor("bias_2"))

    def step(x: Tensor, y: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        source, other = rows(x), None if y is None else rows(y)
        result = torch.empty(len(source), outputs)
        for start in range(0, len(source), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            torch.add(narrow(widen(source[part])), 0 if other is None else other[part], out=result[part])
        return result.view(batch, height, width, -1).permute(0, 3, 1, 2)  # (B, C_out, H, W), channels-last

    return step


def _attention(p: Parameters) -> Step:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (B, heads, N, head_dim) each. Without the copies it is 6 times slower.
        query, key, value = (x.mT.contiguous() for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0).mT

    return step


FUSED_KINDS: dict[str, Kind] = {
    FEED_FORWARD: Kind(("x",), _feed_forward),
    FEED_FORWARD_ADD: Kind(("x", "y"), _feed_forward),
    ATTENTION: Kind(("query", "key", "value"), _attention),
}
"""The fused kinds, by the kind's name."""
