"""Palettes from histograms, compared with k-means on samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvlm.quant.palettes import fit_palette, float16_order

DRAW = np.random.default_rng(5)
WEIGHTS = {
    "normal": DRAW.normal(scale=0.02, size=(64, 64, 1, 1)),
    "heavy tails": DRAW.laplace(scale=0.01, size=(96, 64, 1, 1)),
    "heavier tails": DRAW.standard_t(3, size=(64, 64, 1, 1)),
    "two heaps": np.concatenate([DRAW.normal(-1, 0.1, 3000), DRAW.normal(1, 0.01, 1096)]).reshape(64, 64, 1, 1),
}


def inertia(weight: np.ndarray, kept: np.ndarray) -> float:
    return float(np.square(weight - kept.astype(np.float64)).sum())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_is_as_small_as_with_sampled_kmeans(kind: str, bits: int, tolerance: Callable[[str], float]) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    weight = WEIGHTS[kind].astype(np.float16).astype(np.float32)
    lut, indices = fit_palette(weight, bits)
    found = cluster.KMeans(1 << bits, n_init=1, random_state=0).fit(weight.reshape(-1, 1)).cluster_centers_
    theirs = np.abs(weight.astype(np.float64).reshape(-1, 1) - found.astype(np.float16).reshape(1, -1)).min(1)
    assert inertia(weight, lut[indices]) < tolerance("palette_error") * np.square(theirs).sum()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_each_weight_takes_the_nearest_value(bits: int) -> None:
    weight = WEIGHTS["heavy tails"].astype(np.float32)
    lut, indices = fit_palette(weight, bits)
    assert (lut.shape, lut.dtype, indices.shape, indices.dtype) == ((1 << bits,), np.float16, weight.shape, np.uint8)
    half = weight.astype(np.float16).astype(np.float64)
    distances = np.abs(half[..., None] - lut.astype(np.float64))
    np.testing.assert_array_equal(np.abs(half - lut.astype(np.float64)[indices]), distances.min(-1))


def test_few_distinct_values_are_kept_exactly() -> None:
    weight = DRAW.choice(np.array([-0.5, 0.0, 0.25, 3.0], np.float32), size=(32, 16, 1, 1))
    lut, indices = fit_palette(weight, 4)
    np.testing.assert_array_equal(lut[indices], weight)
    assert np.isfinite(lut).all()


def test_zeros_are_kept() -> None:
    lut, indices = fit_palette(np.zeros((32, 16, 1, 1), np.float32), 4)
    assert not lut[indices].any()


def test_empty_cells_are_filled() -> None:
    weight = np.concatenate([np.linspace(0, 1e-3, 4000), np.linspace(900, 1000, 96)]).reshape(64, 64, 1, 1)
    lut, _ = fit_palette(weight.astype(np.float32), 4)
    assert len(np.unique(lut)) == 16


def test_order_has_every_finite_number_once() -> None:
    values = float16_order().view(np.float16).astype(np.float64)
    assert len(values) == 2 * 31 * 1024
    assert (np.diff(values) >= 0).all()
