"""Fitted affine groups: MLX reads them, and their error is smaller than that of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastvlm.models._mlx import mx
from fastvlm.models.quantization import Affine
from fastvlm.quant.affine_groups import fit_groups, fitted, pack, rounded
from fastvlm.quant.decoder import dequantized

RNG = np.random.default_rng(0)
ALL = [(bits, group_size) for bits in (4, 5, 6, 8) for group_size in (32, 64, 128)]


def noise(weight: np.ndarray, other: mx.array) -> float:
    return float(((np.array(other) - weight) ** 2).sum() / (weight**2).sum())


@pytest.mark.parametrize(("bits", "group_size"), ALL)
def test_mlx_reads_the_packed_codes(bits: int, group_size: int) -> None:
    codes = RNG.integers(0, 2**bits, (6, 256))
    ones, zeros = mx.ones((6, 256 // group_size)), mx.zeros((6, 256 // group_size))
    read = mx.dequantize(mx.array(pack(torch.from_numpy(codes), bits)), ones, zeros, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(np.array(read), codes)


@pytest.mark.parametrize(("bits", "group_size"), ALL)
def test_fitted_groups_have_less_noise_than_mlx(bits: int, group_size: int, tolerance: Callable[[str], float]) -> None:
    weight = RNG.standard_normal((600, 256), dtype=np.float32)  # more rows than are fitted at once
    affine = Affine(group_size, bits)
    plain = mx.dequantize(*mx.quantize(mx.array(weight).astype(mx.float16), **affine.as_dict()), **affine.as_dict())
    least = tolerance("fitted_groups_noise") * noise(weight, plain.astype(mx.float32))
    assert noise(weight, dequantized(fitted(weight, affine), affine)) < least


@pytest.mark.parametrize("value", [0.0, 1e-12, -3.0, 60000.0])
def test_equal_numbers_are_kept(value: float) -> None:
    weight = np.full((2, 64), value, np.float32)
    read = np.array(dequantized(fitted(weight, Affine(64, 4)), Affine(64, 4)))
    np.testing.assert_allclose(read, weight, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_important_columns_have_less_error(bits: int) -> None:
    groups = torch.from_numpy(RNG.standard_normal((200, 64), dtype=np.float32))
    importance = torch.from_numpy(np.exp(2 * RNG.standard_normal(64)).astype(np.float32))

    def error(weights: torch.Tensor | None) -> float:
        scale, bias = fit_groups(groups, bits, weights)
        codes = rounded(groups, scale, bias, bits)
        return float(((codes * scale + bias - groups).square() * importance).sum())

    assert error(importance) < 0.9 * error(None)
    assert error(100 * importance) == pytest.approx(error(importance), rel=1e-3)  # only ratios count
