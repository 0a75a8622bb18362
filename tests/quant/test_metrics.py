"""The errors of quantized networks: agreement of outputs, and the audit of weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models.errors import VerificationError
from fastvlm.quant.metrics import MAX_SNR_DB, WeightAudit, compare
from fastvlm.quant.schemes import store

RNG = np.random.default_rng(0)


@given(st.floats(10, 80))
def test_snr_is_the_noise_that_was_added(snr_db: float) -> None:
    original = RNG.standard_normal((4, 1000))
    noise = RNG.standard_normal(original.shape)
    noise *= np.linalg.norm(original) / np.linalg.norm(noise) * 10 ** (-snr_db / 20)
    assert compare(original, original + noise, "x").snr_db == pytest.approx(snr_db, abs=1e-6)


def test_worst_row_and_argmax_are_found() -> None:
    original = RNG.standard_normal((1, 5, 100))
    other = original.copy()
    other[0, 3, 7] += 1000
    agreement = compare(original, other, "x")
    assert agreement.worst_row == 3
    assert agreement.same_argmax == 0.8
    assert agreement.worst_row_snr_db < agreement.snr_db


def test_equal_outputs_reach_the_ceiling() -> None:
    rows = np.zeros((2, 3))
    rows[0] = 1
    assert compare(rows, rows, "x").snr_db == MAX_SNR_DB
    assert compare(rows, rows, "x").worst_row_snr_db == MAX_SNR_DB


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_infinite_or_nan_output_is_an_error(value: float, side: int) -> None:
    pair = [np.ones((2, 3)), np.ones((2, 3))]
    pair[side][1, 1] = value
    with pytest.raises(VerificationError, match="holds 1 NaN or infinite"):
        compare(*pair, "x")


def test_shapes_must_agree() -> None:
    with pytest.raises(VerificationError, match=r"shape must be \(2, 3\), got \(3, 2\)"):
        compare(np.ones((2, 3)), np.ones((3, 2)), "x")


SCHEMES = {"int8": (8, False), "pal8": (8, True), "pal6": (6, True), "pal4": (4, True), "int4": (4, True)}
"""Bits, and True for fitted levels."""


def weight(tails: bool = False) -> np.ndarray:
    """Returns (out, in, 1, 1) with rows of different sizes, and with long `tails`."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_t(6, (96, 256, 1, 1)) if tails else rng.standard_normal((96, 256, 1, 1))
    return (drawn * rng.uniform(0.5, 2, (96, 1, 1, 1)) / 16).astype(np.float32)


def failures(original: np.ndarray, saved: np.ndarray, scheme: str) -> list[str]:
    audit, (bits, fitted) = WeightAudit(), SCHEMES[scheme]
    audit.add("w", original, saved, bits, fitted=fitted)
    return audit.failures


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_passes(scheme: str, tails: bool) -> None:
    original = weight(tails)
    assert failures(original, store(original, scheme).dense(), scheme) == []


def swap(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[[5, 70]] = values[[70, 5]]
    return values


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda q: q * 1.02, "too large"),
        (lambda q: q * 0.98, "too small"),
        (swap, "differs in 2 of 96 rows"),
        (lambda q: np.concatenate([q[:9], 0 * q[9:10], q[10:]]), "differs in 1 of 96 rows"),
        (lambda q: q[:, ::-1], "dB of the checkpoint's"),
        (lambda q: q[:90], r"must be of shape \[96, 256, 1, 1\]"),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_damage_is_found_despite_rounding(scheme: str, damage: Callable, said: str) -> None:
    original = weight()
    (failure,) = failures(original, damage(store(original, scheme).dense()), scheme)
    assert re.search(said, failure)


def test_infinite_weight_is_an_error() -> None:
    saved = weight()
    saved[3, 4] = np.inf
    with pytest.raises(VerificationError, match="w holds 1 NaN or infinite"):
        failures(weight(), saved, "int8")


def test_worst_weight_is_named() -> None:
    audit, original = WeightAudit(), weight()
    for name, scheme in (("a", "int8"), ("b", "pal6"), ("c", "pal8")):
        bits, fitted = SCHEMES[scheme]
        audit.add(name, original, store(original, scheme).dense(), bits, fitted=fitted)
    assert (audit.count, audit.least_snr_name) == (3, "b")
    assert 25 < audit.as_dict()["least_snr_db"] < 35


def test_equal_weights_have_no_worst() -> None:
    audit = WeightAudit()
    audit.add("a", weight(), weight(), 16)
    assert audit.as_dict() == {"count": 1, "least_snr_db": None, "least_snr_name": None}
