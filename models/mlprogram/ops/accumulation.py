"""Sums in float16, term by term, and other results in steps of float16, as Apple's Core AI interpreter computes them.

Compared with the interpreter (coreai-core 1.0.0b3) on single float16 layers, every value is equal:

- `matmul`, `linear` and `einsum` round each product, and add it to a float16 sum, first term first.
- `conv` adds in float32 and rounds. The bias is added to that and rounded again. `linear` adds it last, too.
- `gelu` is half of x, times the erfc of -x / sqrt(2), each rounded.
- Means, sums, softmax, layer norm and average pools add in float32 and round once, as the ordinary kinds do.

Fused attention is two such products with a softmax between them. The interpreter's own agrees with it to 59 dB. Two
kinds that no FastVLM encoder has are not modelled: the interpreter adds `cumsum` and `conv_transpose` by parts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from ..binding import Kind, Parameters, Step
from .elementwise import ELEMENTWISE
from .matrix import MATRICES
from .window import WINDOWS

HALF = torch.float16


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """Returns x @ y of float16 values, (..., M, K) by (..., K, N) -> (..., M, N), in the float16 of each step."""
    left = x.to(HALF).movedim(-1, 0).unsqueeze(-1).contiguous()  # (K, ..., M, 1)
    right = y.to(HALF).movedim(-2, 0).unsqueeze(-2).contiguous()  # (K, ..., 1, N)
    total = torch.zeros(torch.broadcast_shapes(left.shape[1:], right.shape[1:]), dtype=HALF)
    term = torch.empty_like(total)
    for a, b in zip(left, right, strict=True):
        total += torch.mul(a, b, out=term)
    return total.to(torch.float32)


def _matmul(p: Parameters) -> Step:
    transpose_x, transpose_y = p.integer("transpose_x", 0), p.integer("transpose_y", 0)

    def step(x: Tensor, y: Tensor) -> Tensor:
        left = x[None] if x.ndim == 1 else x.mT if transpose_x else x
        right = y[:, None] if y.ndim == 1 else y.mT if transpose_y else y
        total = sum_of_products(left, right)
        total = total.squeeze(-2) if x.ndim == 1 else total
        return total.squeeze(-1) if y.ndim == 1 else total

    return step


def _linear(p: Parameters) -> Step:
    weight, bias = p.required("weight"), p.tensor("bias")

    def step(x: Tensor) -> Tensor:
        total = sum_of_products(x[None], weight.mT)[0]
        return total if bias is None else total + bias

    return step


def _einsum(p: Parameters) -> Step:
    left, _, right = p.text("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    summed = sorted(set(left) - {","} - set(right))
    outer = ",".join("".join(letter for letter in letters if letter in right) for letters in terms) + "->" + right

    def step(*values: Tensor) -> Tensor:
        sizes = dict(zip("".join(terms), (size for value in values for size in value.shape), strict=True))
        total: Tensor | float = 0.0
        for places in product(*(range(sizes[letter]) for letter in summed)):
            at = dict(zip(summed, places, strict=True))
            parts = [_at(value.to(HALF), letters, at) for value, letters in zip(values, terms, strict=True)]
            total = total + torch.einsum(outer, *parts)
        assert isinstance(total, Tensor)
        return total.to(torch.float32)

    return step


def _at(value: Tensor, letters: Sequence[str], places: dict[str, int]) -> Tensor:
    """Returns the part of `value` at the places of some of its axes, without these axes."""
    return value[tuple(places.get(letter, slice(None)) for letter in letters)]


def _attention(p: Parameters) -> Step:
    mask = p.tensor("attn_mask")

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = sum_of_products(_rounded(query * query.shape[-1] ** -0.5), key.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else _rounded(scores + mask)
        return sum_of_products(torch.softmax(scores, -1), value)

    return step


def _conv(p: Parameters) -> Step:
    bias, step = p.tensor("bias"), WINDOWS["conv"].bind(p.without("bias"))
    if bias is None:
        return step
    return lambda x: _rounded(step(x)).add_(bias.reshape(-1, *[1] * (x.ndim - 2)))


def _gelu(p: Parameters) -> Step:
    if p.text("mode", "EXACT") != "EXACT":
        return ELEMENTWISE["gelu"].bind(p)
    root = float(torch.tensor(0.5).sqrt().to(HALF))
    return lambda x: _rounded(0.5 * x).mul_(_rounded(torch.special.erfc(_rounded(x * -root))))


def _rounded(x: Tensor) -> Tensor:
    return x.to(HALF).to(torch.float32)


def _in_float16(kind: Kind, bind: Callable[[Parameters], Step]) -> Kind:
    """Returns `kind` with another step where the result is float16. A float32 result keeps its float32 sums."""
    return replace(kind, bind=lambda p: bind(p) if p.output.dtype == "fp16" else kind.bind(p))


FLOAT16_SUMS: dict[str, Kind] = {
    "conv": _in_float16(WINDOWS["conv"], _conv),
    "einsum": _in_float16(MATRICES["einsum"], _einsum),
    "gelu": _in_float16(ELEMENTWISE["gelu"], _gelu),
    "linear": _in_float16(MATRICES["linear"], _linear),
    "matmul": _in_float16(MATRICES["matmul"], _matmul),
    "scaled_dot_product_attention": _in_float16(MATRICES["scaled_dot_product_attention"], _attention),
}
"""The kinds that are rounded step by step, by MIL name."""
