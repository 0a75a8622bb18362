"""Replacements for operations that are slow in MLX's CPU backend, made of fast ones. Metal and CUDA have fast kernels.

Times per number on one x86-64 core: `mx.exp` 11 ns, `mx.power` 4 ns, the four basic operations 0.3 ns.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import numpy as np

from ._mlx import mx, on_cpu
from .quantization import Affine

LOG2_E = math.log2(math.e)

QUERY_BLOCK = 64
"""The queries that attend at a time. A block skips the keys after its last query, which saves half of the scores."""

FULL_BLOCK_KEYS = 1024
"""The most keys of a full block of queries. With more keys blocks are smaller, so that scores take the same memory."""

LEAST_QUERIES = 8
"""The fewest queries of a block, however many keys they have."""

FEW_ROWS = range(8, 65)
"""The numbers of rows for which `swapped_product` is faster on some processors.

With the 0.5B's matrices 16 rows took 0.6 of the time on one. On AMD's Zen 5 they take as long, and 13 rows 1.4 times.
"""

TRIAL_ROWS, TRIAL_SHAPE, TRIALS = 13, (4864, 896), 5
"""The rows and the matrix (out, in) with which the two products are compared. All trials take some 20 ms."""

SPLIT_BITS = (2, 4, 8)
"""The widths that divide 32. No value is in two words, so that MLX unpacks them in little memory."""

BLOCK_ELEMENTS = 2**22
"""The numbers of other widths that are unpacked at a time. Each takes 24 bytes, so an embedding table takes 3 GB."""


def swapped_product(x: mx.array, weight: mx.array) -> mx.array:
    """Returns x (..., in) times the transpose of `weight` (out, in), computed as weight times x transposed: (..., out).

    A BLAS rearranges its right matrix. With few rows in x this takes longer than the product, so x is on the right.
    """
    return (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)


@functools.cache
def swapping_pays() -> bool:
    """Returns whether `swapped_product` is faster than the plain product here, measured at the first call."""
    x, weight = mx.ones((TRIAL_ROWS, TRIAL_SHAPE[1])), mx.ones(TRIAL_SHAPE)
    mx.eval(x, weight)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(TRIALS):
        for swaps, found in seconds.items():
            start = time.perf_counter()
            mx.eval(swapped_product(x, weight) if swaps else x @ weight.T)
            found.append(time.perf_counter() - start)
    return min(seconds[True]) < min(seconds[False])


def silu(x: mx.array) -> mx.array:
    """Returns x * sigmoid(x), float32."""
    return x / (1.0 + mx.power(2.0, x * -LOG2_E))


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Returns the attention (B, H, L, head_dim) of L queries, the last of which is at the last key.

    `queries` are (B, H, L, head_dim), `keys` and `values` (B, kv_heads, N, head_dim). It is computed in float32. Each
    block of queries is evaluated before the next. Otherwise MLX allocates the scores of many blocks ahead of the
    computation, 2 GB at 8,192 keys.
    """
    dtype, L, N = queries.dtype, queries.shape[2], keys.shape[2]
    block = max(LEAST_QUERIES, min(QUERY_BLOCK, QUERY_BLOCK * FULL_BLOCK_KEYS // N))
    queries = queries.astype(mx.float32) * (scale * LOG2_E)  # scores are then powers of two
    keys, values = keys.astype(mx.float32).swapaxes(2, 3), values.astype(mx.float32)  # (B, kv_heads, head_dim, N)
    outs = []
    for start in range(0, L, block):
        stop = min(start + block, L)
        seen = N - L + stop
        outs.append(_attended(queries[:, :, start:stop], keys[..., :seen], values[:, :, :seen]))
        if block < L:
            mx.eval(outs[-1])
    return (outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)).astype(dtype)  # (B, H, L, head_dim)


def rotated(x: mx.array, offsets: Sequence[int], theta: float) -> mx.array:
    """Rotates half-split heads x (B, H, L, head_dim), whose rows begin at the positions `offsets`.

    `offsets` has one number per row, or one for all. The first layer computes the angles, the others reuse them.
    """
    cosines, sines = _rotary_tables(tuple(offsets), x.shape[2], x.shape[3], theta)  # (rows, 1, L, head_dim) each
    half = x.shape[3] // 2
    turned = mx.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return (x * cosines + turned * sines).astype(x.dtype)


@functools.lru_cache(maxsize=4)
def _rotary_tables(offsets: tuple[int, ...], count: int, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Returns cosines and signed sines of each position's angles, computed in float32 as in Hugging Face."""
    frequencies = np.float32(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    positions = np.array(offsets, np.float32)[:, None, None, None] + np.arange(count, dtype=np.float32)[:, None]
    angles = positions * frequencies  # (rows, 1, L, head_dim / 2)
    cosines, sines = np.cos(angles), np.sin(angles)
    return mx.array(np.concatenate([cosines, cosines], -1)), mx.array(np.concatenate([-sines, sines], -1))


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, affine: Affine, stream: mx.Stream | None = None
) -> mx.array:
    """Returns the matrix (rows, columns) of packed words in the dtype of `scales` and `biases`."""

    def expanded(rows: slice) -> mx.array:
        return mx.dequantize(
            weight[rows], scales[rows], biases[rows], group_size=affine.group_size, bits=affine.bits, stream=stream
        )

    count, groups = scales.shape
    rows = max(1, BLOCK_ELEMENTS // (groups * affine.group_size))
    if affine.bits in SPLIT_BITS or rows >= count or not on_cpu():
        return expanded(slice(None))
    blocks = []
    for start in range(0, count, rows):
        blocks.append(expanded(slice(start, start + rows)))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, stream=stream)


def _attended(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    B, H, L, head_dim = queries.shape
    kv_heads, seen = values.shape[1:3]
    queries = queries.reshape(B, kv_heads, H // kv_heads * L, head_dim)  # the heads of a group share one product
    scores = (queries @ keys).reshape(B, H, L, seen)
    if L > 1:
        scores = scores + _mask(L, seen)
    weights = mx.power(2.0, scores - scores.max(-1, keepdims=True))
    sums = weights.sum(-1, keepdims=True)  # (B, H, L, 1)
    mixed = weights.reshape(B, kv_heads, -1, seen) @ values  # (B, kv_heads, group * L, head_dim)
    return mixed.reshape(B, H, L, head_dim) / sums


@functools.lru_cache(maxsize=8)
def _mask(count: int, seen: int) -> mx.array:
    """Returns a mask (count, seen): 0 up to each query's position, else -inf. The last query is at the last key."""
    mask = mx.where(mx.arange(seen) <= mx.arange(seen - count, seen)[:, None], 0.0, -math.inf)
    mx.eval(mask)
    return mask
