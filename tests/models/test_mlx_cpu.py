"""Blocks of affine groups, and of queries, equal what MLX computes at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

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


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (9, 9), (20, 20), (20, 64), (64, 64)])
def test_blocks_of_queries_equal_attention_at_once(
    queries: int, keys: int, tolerance: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(queries)
    q, k, v = (mx.array(draw.standard_normal((2, heads, count, 16)), mx.float32) for heads, count in
               ((4, queries), (2, keys), (2, keys)))  # fmt: skip
    whole = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    monkeypatch.setattr(mlx_cpu, "QUERY_BLOCK", 16)
    monkeypatch.setattr(mlx_cpu, "FULL_BLOCK_KEYS", 16)
    monkeypatch.setattr(mlx_cpu, "LEAST_QUERIES", 3)
    found = mlx_cpu.causal_attention(q, k, v, 0.25)
    np.testing.assert_allclose(np.array(found), np.array(whole), rtol=0, atol=tolerance("quantized_attention_float32"))


@pytest.fixture
def measured_again() -> Iterator[None]:
    mlx_cpu.swapping_pays.cache_clear()
    yield
    mlx_cpu.swapping_pays.cache_clear()


@pytest.mark.usefixtures("measured_again")
@pytest.mark.parametrize(("seconds", "pays"), [(0.0, True), (0.2, False)])
def test_faster_product_is_chosen(seconds: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: mx.array, weight: mx.array) -> mx.array:
        time.sleep(seconds)
        return x

    monkeypatch.setattr(mlx_cpu, "swapped_product", product)
    assert mlx_cpu.swapping_pays() is pays
