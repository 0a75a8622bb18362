"""The schemes: stored numbers, their error and their size."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm.models.errors import UsageError
from fastvlm.models.mlprogram.program import pack_bits, unpack_bits
from fastvlm.quant.schemes import (
    MIN_WEIGHT_SNR_DB,
    check_scheme,
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
