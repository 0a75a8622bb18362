"""Stored weights as operations of a program."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm.models.errors import PackageError
from fastvlm.quant.constexprs import affine_parts, check_numbers, conv_name, palette_parts
from fastvlm.quant.schemes import store, weight_snr_db, with_groups

WEIGHT = np.random.default_rng(0).standard_normal((64, 64, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("name", ["3.conv", "3.conv.weight", "3.conv.weight_to_fp16"])
def test_name_of_a_convolution_is_without_suffixes(name: str) -> None:
    assert conv_name(name) == "3.conv"


@pytest.mark.parametrize("found", [None, WEIGHT.astype(np.float16)])
def test_weight_unlike_its_stored_form_is_an_error(found: np.ndarray | None) -> None:
    stored = store(WEIGHT, "pal4")
    check_numbers("3.conv", stored.dense().astype(np.float16), stored)
    with pytest.raises(PackageError, match=r"3\.conv: the weight in the program differs from the one stored as pal4"):
        check_numbers("3.conv", found, stored)


@pytest.mark.parametrize(("scheme", "bits"), [("pal4", 4), ("pal6", 6), ("pal8", 8)])
def test_palette_of_ios17_has_packed_indices(scheme: str, bits: int) -> None:
    parts = palette_parts(store(WEIGHT, scheme), ios18=False)
    assert parts["indices"].size == WEIGHT.size * bits // 8
    assert parts["lut"].shape == (1 << bits,)
    assert parts["shape"].tolist() == [64, 64, 1, 1]


def test_grouped_palette_of_ios18_has_a_table_per_32_channels() -> None:
    stored = with_groups(WEIGHT, store(WEIGHT, "pal4"))
    parts = palette_parts(stored, ios18=True)
    assert parts["lut"].shape == (2, 1, 1, 1, 16, 1)
    for group, table in zip(np.split(stored.dense(), 2), parts["lut"].reshape(2, 16), strict=True):
        assert set(group.ravel()) <= set(table.astype(np.float32))
    assert weight_snr_db(WEIGHT, stored.dense()) > weight_snr_db(WEIGHT, store(WEIGHT, "pal4").dense())


def test_only_palettes_that_groups_divide_have_groups() -> None:
    assert with_groups(WEIGHT[:48], stored := store(WEIGHT[:48], "pal4")) is stored
    assert with_groups(WEIGHT, stored := store(WEIGHT, "pal8")) is stored


def test_int8_has_a_scale_and_a_zero_point_per_channel() -> None:
    parts = affine_parts(store(WEIGHT, "int8"))
    assert parts["scale"].shape == parts["zero_point"].shape == (64,)
    assert not parts["zero_point"].any()
    dense = parts["quantized_data"] * parts["scale"].astype(np.float32)[:, None, None, None]
    np.testing.assert_array_equal(dense.astype(np.float16), store(WEIGHT, "int8").dense().astype(np.float16))
