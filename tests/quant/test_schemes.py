"""The schemes: stored numbers, their error and their size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvlm.models.errors import UsageError
from fastvlm.models.mlprogram.program import pack_bits, unpack_bits
from fastvlm.quant.schemes import (
    MIN_WEIGHT_SNR_DB,
    check_scheme,
    fit_palette,
    float16_order,
    is_candidate,
    store,
    stored_bytes,
    stored_if_kept,
    weight_snr_db,
)

WEIGHT = (
    np.random.default_rng(3).normal(size=(96, 64, 1, 1)) * np.geomspace(0.01, 0.02, 96)[:, None, None, None]
).astype(np.float32)
NORMAL_SNR_DB = {"int8": 40.0, "pal8": 42.0, "pal6": 30.0, "int4": 19.0, "pal4": 19.0}
"""The SNR of normally distributed numbers by rate-distortion tables, less 2 dB for different channel scales."""


@pytest.mark.parametrize("scheme", MIN_WEIGHT_SNR_DB)
def test_scheme_reaches_the_theoretical_snr_and_size(scheme: str) -> None:
    stored = store(WEIGHT, scheme)
    dense = stored.dense()
    assert dense.shape == WEIGHT.shape
    np.testing.assert_array_equal(dense, dense.astype(np.float16))
    assert weight_snr_db(WEIGHT, dense) > NORMAL_SNR_DB[scheme]
    zero_points = 96 if scheme == "int8" else 0
    assert stored_bytes(WEIGHT.shape, scheme) == stored.nbytes + zero_points


def test_int4_clips_where_that_lowers_the_error() -> None:
    weight = np.full((16, 32, 1, 1), 0.1, np.float32) * np.sign(WEIGHT[:16, :32])
    weight[:, 0] = 0.75
    reaching = np.rint(weight / (0.75 / 7)) * (0.75 / 7)
    assert weight_snr_db(weight, store(weight, "int4").dense()) >= weight_snr_db(weight, reaching)
    assert store(WEIGHT, "int4").data.min() >= -8
    assert store(WEIGHT, "int4").data.max() <= 7


def test_int4_without_whole_blocks_has_a_scale_per_channel() -> None:
    stored = store(WEIGHT[:, :40], "int4")
    assert stored.scale.shape == (96, 1, 1, 1)
    assert weight_snr_db(WEIGHT[:, :40], stored.dense()) > 15


@pytest.mark.parametrize(
    ("shape", "candidate"),
    [((96, 64, 1, 1), True), ((384, 1, 7, 7), False), ((96, 3, 3, 3), False), ((32, 32, 1, 1), False)],
)
def test_depthwise_small_and_first_weights_stay_float16(shape: tuple[int, ...], candidate: bool) -> None:
    assert is_candidate(np.ones(shape, np.float32)) == candidate
    assert candidate or stored_if_kept(np.ones(shape, np.float32), "int8") is None


def test_weights_that_int8_would_spoil_stay_float16() -> None:
    assert stored_if_kept(WEIGHT, "int8") is not None
    assert stored_if_kept(WEIGHT * np.float32(1e-6), "int8") is None  # scales that underflow
    spoiled = WEIGHT.copy()
    spoiled[:, 0] = 5.0
    assert stored_if_kept(spoiled, "int8") is not None  # large values, so the sum keeps its SNR
    assert stored_if_kept(np.zeros_like(WEIGHT), "pal4") is None


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [0, 1, 23, 24, 1001])
def test_packed_bits_are_unpacked_again(bits: int, count: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_bits(values, bits)
    assert len(packed) == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), values)


def test_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"quant must be one of fp16, int8, .*pal4.* \(got 'int3'\)"):
        check_scheme("int3")


DRAW = np.random.default_rng(5)
WEIGHTS = {
    "normal": DRAW.normal(scale=0.02, size=(64, 64, 1, 1)),
    "heavy tails": DRAW.laplace(scale=0.01, size=(96, 64, 1, 1)),
    "heavier tails": DRAW.standard_t(3, size=(64, 64, 1, 1)),
    "two heaps": np.concatenate([DRAW.normal(-1, 0.1, 3000), DRAW.normal(1, 0.01, 1096)]).reshape(64, 64, 1, 1),
}


def inertia(weight: np.ndarray, kept: np.ndarray) -> float:
    return float(np.square(weight - kept.astype(np.float64)).sum())


@pytest.mark.slow
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


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_small_row_vanishes_instead_of_drowning_in_noise(bits: int) -> None:
    weight = WEIGHTS["heavy tails"].astype(np.float32)
    before, _ = fit_palette(weight, bits)
    assert before.all()  # no value is 0, so the nearest one would be the small row's noise
    weight[3] *= 1e-6
    lut, indices = fit_palette(weight, bits)
    assert not lut[indices[3]].any()
    others = np.arange(len(weight)) != 3
    assert inertia(weight[others], lut[indices[others]]) < 1.2 * inertia(
        weight[others], nearest(weight[others], before)
    )


def nearest(weight: np.ndarray, lut: np.ndarray) -> np.ndarray:
    return lut[np.abs(weight[..., None] - lut.astype(np.float32)).argmin(-1)]


def test_pal8_leaves_weights_with_a_tiny_row_to_int8() -> None:
    weight = DRAW.standard_normal((256, 64, 1, 1), dtype=np.float32)
    assert stored_if_kept(weight, "pal8") is not None
    weight[7] *= 1e-3
    assert stored_if_kept(weight, "pal8") is None
    for scheme in ("int8", "pal6", "pal4"):
        assert stored_if_kept(weight, scheme) is not None


def test_empty_cells_are_filled() -> None:
    weight = np.concatenate([np.linspace(0, 1e-3, 4000), np.linspace(900, 1000, 96)]).reshape(64, 64, 1, 1)
    lut, _ = fit_palette(weight.astype(np.float32), 4)
    assert len(np.unique(lut)) == 16


def test_order_has_every_finite_number_once() -> None:
    values = float16_order().view(np.float16).astype(np.float64)
    assert len(values) == 2 * 31 * 1024
    assert (np.diff(values) >= 0).all()
