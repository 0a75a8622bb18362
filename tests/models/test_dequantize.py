"""Affine groups read block by block are what MLX reads at once."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm.models import dequantize
from fastvlm.models._mlx import mx
from fastvlm.models.quantization import Affine


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows_at_once", [1, 7, 40])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_blocks_are_the_whole(bits: int, rows_at_once: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "BLOCK_ELEMENTS", rows_at_once * 128)
    monkeypatch.setattr(dequantize, "on_cpu", lambda: on_cpu)
    values = np.random.default_rng(bits).normal(size=(40, 128)).astype(np.float32)
    packed = mx.quantize(mx.array(values), group_size=64, bits=bits)
    expected = mx.dequantize(*packed, group_size=64, bits=bits)
    found = dequantize.dequantize(*packed, Affine(64, bits))
    np.testing.assert_array_equal(np.array(found), np.array(expected))
