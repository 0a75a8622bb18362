"""The caches of keys and values: plain, quantized and padded for batches.

Indices are written `[:, :, start:stop]`. MLX parses an ellipsis on the host in another microsecond, four times a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ._mlx import mx
from .errors import UsageError

CACHE_STEP = 256
"""The positions by which a full cache grows. Each growth copies it once."""

KV_BITS = 8
"""The only supported width of quantized keys and values. Fewer bits cost accuracy."""

KV_GROUPS = (64, 32)
"""The supported group sizes, in values that share a scale, the coarsest first."""

Packed = tuple[mx.array, mx.array, mx.array]
"""The words, scales and biases of affine groups, (B, H, L, width) each."""


class Padding:
    """The left padding of a batch: the number of unused positions at the beginning of each row.

    All layers of a step need the same arrays, which are made once.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self._counts = mx.array(self.counts, mx.int32)
        self._offset, self._positions = 0, -self._counts
        self._shape, self._seen = (0, 0), self._counts

    def positions(self, offset: int) -> mx.array:
        """Returns the position (B,) in its own sequence of the token written at `offset`."""
        if offset != self._offset:
            self._offset, self._positions = offset, offset - self._counts
        return self._positions

    def seen(self, length: int, heads: int = 1) -> mx.array:
        """Returns the mask (B, heads, 1, length), True where a row is not padding."""
        if (heads, length) != self._shape:
            self._shape = heads, length
            seen = (mx.arange(length) >= self._counts[:, None])[:, None, None]  # (B, 1, 1, length)
            if heads > 1:
                seen = mx.contiguous(mx.broadcast_to(seen, (len(self.counts), heads, 1, length)))
            self._seen = seen
        return self._seen


class KVCache:
    """The keys and values of one layer for the positions seen so far.

    The buffers are (B, num_key_value_heads, capacity, head_dim). Their first `offset` positions are in use. The first
    allocation has `capacity` positions. Beyond it the cache grows in steps of 256.

    Attributes:
        padding: The padding of a batch whose rows differ in length, or None.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.offset = 0
        self.capacity = capacity
        self.padding: Padding | None = None
        self.buffers: list[mx.array] = []

    @property
    def rows(self) -> int:
        """The number of sequences in the cache."""
        return self.buffers[0].shape[0] if self.buffers else 0

    @property
    def positions(self) -> int | mx.array:
        """The position of the next token in its sequence: one for all rows, or (B,)."""
        return self.offset if self.padding is None else self.padding.positions(self.offset)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The same as `positions`, on the host: one number for all rows, or one per row."""
        return (self.offset,) if self.padding is None else tuple(self.offset - n for n in self.padding.counts)

    def update(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Appends keys and values (B, H, L, head_dim). Returns all of them so far, (B, H, offset, head_dim)."""
        start, stop = self.offset, self.offset + keys.shape[2]
        parts = self._stored(keys, values)
        self.offset = stop
        if not self.buffers or stop > self.buffers[0].shape[2]:
            self._grow(parts, start)
        held = []
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[:, :, start:stop] = part
            held.append(buffer[:, :, :stop])
        return self._read(held)

    def trim(self, count: int) -> None:
        """Removes the last `count` positions."""
        if not 0 <= count <= self.offset:
            raise ValueError(f"cannot remove {count} of {self.offset} positions")
        self.offset -= count

    def reserve(self, capacity: int) -> None:
        """Sets the least number of positions to which the cache grows when it next grows."""
        self.capacity = max(self.capacity, capacity)

    def fork(self, capacity: int = 0, length: int | None = None) -> KVCache:
        """Returns an independent cache with the first `length` positions (None: all), which grows to `capacity`."""
        twin = copy.copy(self)
        twin.capacity = capacity
        twin.offset = self.offset if length is None else length
        twin.buffers = [buffer[:, :, : twin.offset] for buffer in self.buffers]
        return twin

    def compact(self, length: int) -> KVCache:
        """Returns an independent cache with the first `length` positions and no spare ones, not yet evaluated."""
        twin = self.fork(length=length)
        twin.buffers = [mx.contiguous(buffer) for buffer in twin.buffers]
        return twin

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def _stored(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        """Returns what the buffers store for keys and values, (B, heads, L, width) each."""
        return keys, values

    def _read(self, held: list[mx.array]) -> tuple[Any, Any]:
        """Returns the keys and values from the used positions of the buffers."""
        keys, values = held
        return keys, values

    def _grow(self, parts: Sequence[mx.array], used: int) -> None:
        if self.offset > self.capacity:
            self.capacity = -(-self.offset // CACHE_STEP) * CACHE_STEP
        kept = [buffer[:, :, :used] for buffer in self.buffers] or [part[:, :, :0] for part in parts]
        self.buffers = [_padded(buffer, right=self.capacity - used) for buffer in kept]


class QuantizedKVCache(KVCache):
    """A KVCache with 8 bits per number, affine in groups along head_dim. It returns keys and values packed.

    Its buffers are words, scales and biases, each with the heads of the keys before those of the values.

    Raises:
        UsageError: `head_dim` does not divide into groups.
    """

    def __init__(self, head_dim: int, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.group_size = next((size for size in KV_GROUPS if head_dim % size == 0), 0)
        if not self.group_size:
            raise UsageError(
                f"kv_bits={KV_BITS} needs attention heads of a multiple of {KV_GROUPS[-1]} channels (got {head_dim}). "
                "Leave kv_bits out for this model.",
                "kv_bits",
            )

    def dequantized(self, parts: Packed) -> mx.array:
        """Returns the array (B, H, L, head_dim) of packed parts from `update`."""
        words, scales, biases = parts
        return mx.dequantize(words, scales, biases, group_size=self.group_size, bits=KV_BITS)

    def _stored(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        return mx.quantize(mx.concatenate([keys, values], axis=1), group_size=self.group_size, bits=KV_BITS)

    def _read(self, held: list[mx.array]) -> tuple[Packed, Packed]:
        heads = held[0].shape[1] // 2
        words, scales, biases = held
        keys = words[:, :heads], scales[:, :heads], biases[:, :heads]
        return keys, (words[:, heads:], scales[:, heads:], biases[:, heads:])


def check_kv_bits(kv_bits: int | None) -> None:
    """Raises UsageError unless `kv_bits` is None or 8."""
    if kv_bits not in (None, KV_BITS):
        raise UsageError(f"kv_bits must be {KV_BITS} or left out (got {kv_bits!r:.40}).", "kv_bits")


def stacked(caches: Sequence[KVCache], room: int) -> KVCache:
    """Returns one cache with the rows of all, aligned at their ends, and space for `room` more positions."""
    offset = max(cache.offset for cache in caches)
    batch = caches[0].fork(offset + room)
    batch.offset = offset
    batch.buffers = [
        mx.concatenate(
            [_padded(buffer[:, :, : cache.offset], offset - cache.offset, room) for cache, buffer in rows], axis=0
        )
        for rows in zip(*([(cache, buffer) for buffer in cache.buffers] for cache in caches), strict=True)
    ]  # (rows, H, offset + room, width)
    batch.padding = Padding([offset - cache.offset + count for cache in caches for count in _padding_counts(cache)])
    return batch


def selected(cache: KVCache, rows: Sequence[int]) -> KVCache:
    """Returns a cache with the given rows of a batch, without the padding that they have in common."""
    counts = [_padding_counts(cache)[row] for row in rows]
    shared = min(counts)
    chosen = cache.fork(cache.capacity)
    chosen.offset = cache.offset - shared
    index = mx.array(list(rows))
    chosen.buffers = [buffer[index][:, :, shared : cache.offset] for buffer in cache.buffers]
    chosen.padding = Padding([count - shared for count in counts])
    return chosen


def extracted(cache: KVCache, row: int, length: int) -> KVCache:
    """Returns the first `length` positions of one row of a batch as a cache of its own, not yet evaluated."""
    start = _padding_counts(cache)[row]
    single = cache.fork()
    single.offset, single.padding = length, None
    single.buffers = [mx.contiguous(buffer[row : row + 1, :, start : start + length]) for buffer in cache.buffers]
    return single


def _padding_counts(cache: KVCache) -> tuple[int, ...]:
    return cache.padding.counts if cache.padding else (0,) * cache.rows


def _padded(buffer: mx.array, left: int = 0, right: int = 0) -> mx.array:
    """Returns (B, H, left + L + right, width): the L positions of `buffer` between zeros."""
    B, heads, _, width = buffer.shape
    sides = [mx.zeros((B, heads, count, width), buffer.dtype) for count in (left, right)]
    return mx.concatenate([sides[0], buffer, sides[1]], axis=2)
