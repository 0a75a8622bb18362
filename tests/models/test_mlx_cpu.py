"""Affine groups that are unpacked in blocks equal those that MLX unpacks at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvlm.models import mlx_cpu
from fastvlm.models._mlx import mx
from fastvlm.models.quantization import Affine


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows_at_once", [1, 7, 40])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_blocks_are_the_whole(
    bits: int, rows_at_once: int, device: str, monkeypatch: pytest.MonkeyPatch, computing_on: Callable
) -> None:
    monkeypatch.setattr(mlx_cpu, "BLOCK_ELEMENTS", rows_at_once * 128)
    computing_on(device)
    values = np.random.default_rng(bits).normal(size=(40, 128)).astype(np.float32)
    packed = mx.quantize(mx.array(values), group_size=64, bits=bits)
    expected = mx.dequantize(*packed, group_size=64, bits=bits)
    found = mlx_cpu.dequantize(*packed, Affine(64, bits))
    np.testing.assert_array_equal(np.array(found), np.array(expected))
