"""MLX's affine groups read back, without the memory that its CPU back end would take."""

from __future__ import annotations

from ._mlx import mx, on_cpu
from .quantization import Affine

SPLIT_BITS = (2, 4, 8)
"""Of these whole numbers fit into a word: MLX takes them apart in little memory."""

BLOCK_ELEMENTS = 2**22
"""Read at a time of other bits, each in 24 bytes on the CPU: an embedding table would take 3 GB."""


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, affine: Affine, stream: mx.Stream | None = None
) -> mx.array:
    """The matrix (rows, columns) of packed words, and of scales and biases per group, in the type of these."""

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
