"""GPTQ: products with inputs like those of the calibration have less error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models.quantization import Affine
from fastvlm.quant import gptq as module
from fastvlm.quant.affine_groups import fitted
from fastvlm.quant.decoder import dequantized
from fastvlm.quant.gptq import Hessian, compensated_codes, gptq, rounding_order, spans

RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((128, 128), dtype=np.float32) * np.exp(-np.arange(128, dtype=np.float32) / 16)[:, None]
"""A few directions carry most of the inputs, as in real activations."""
WEIGHT = RNG.standard_normal((96, 128), dtype=np.float32)
AFFINE = Affine(32, 4)


def inputs(tokens: int) -> np.ndarray:
    return RNG.standard_normal((tokens, 128), dtype=np.float32) @ MIX


def hessian(tokens: int, columns: int = 128) -> Hessian:
    found = Hessian(columns, 32)
    found.add(inputs(tokens)[:, :columns])
    return found


def noise_db(weight: np.ndarray) -> float:
    x = inputs(500)
    return 10 * np.log10(((x @ WEIGHT.T) ** 2).sum() / ((x @ (weight - WEIGHT).T) ** 2).sum())


def test_products_have_less_error_than_nearest_levels(tolerance: Callable[[str], float]) -> None:
    nearest = np.array(dequantized(fitted(WEIGHT, AFFINE), AFFINE))
    found = np.array(dequantized(gptq(WEIGHT, hessian(400).feedback(), AFFINE), AFFINE))
    assert noise_db(found) > noise_db(nearest) + tolerance("gptq_products_gain_db")


def test_columns_with_large_inputs_count_more_in_the_fit(tolerance: Callable[[str], float]) -> None:
    draw = np.random.default_rng(1)
    scales = np.exp(draw.standard_normal(128)).astype(np.float32)
    seen, unseen = (draw.standard_normal((400, 128), dtype=np.float32) * scales for _ in range(2))
    found = Hessian(128, 32)
    found.add(seen)
    feedback = found.feedback()
    alike = feedback._replace(importance=[torch.ones(128)])
    errors = [
        np.square(unseen @ (np.array(dequantized(gptq(WEIGHT, factors, AFFINE), AFFINE)) - WEIGHT).T).sum()
        for factors in (feedback, alike)
    ]
    assert 10 * np.log10(errors[1] / errors[0]) > tolerance("gptq_importance_gain_db")


@pytest.mark.parametrize("step", [0.5, 0.02])
def test_products_with_given_levels_have_less_error(step: float, tolerance: Callable[[str], float]) -> None:
    codes = compensated_codes(
        WEIGHT, hessian(400).feedback(), lambda x: ((x / step).round(), (x / step).round() * step)
    )
    gain_db = noise_db(codes * np.float32(step)) - noise_db(np.rint(WEIGHT / step) * np.float32(step))
    assert gain_db > tolerance("gptq_products_gain_db")


@given(st.lists(st.floats(0, 1e9, width=32), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_columns_are_rounded_by_falling_energy_and_groups_stay_together(energies: list[float], size: int) -> None:
    energy = torch.tensor(energies, dtype=torch.float64).repeat_interleave(size)
    energy[::2] *= 0.5
    order = rounding_order(energy, size)
    assert sorted(order.tolist()) == list(range(len(energy)))
    groups = order.reshape(-1, size)
    assert (groups // size == groups[:, :1] // size).all()
    sorted_energy = energy[groups]
    assert (sorted_energy.diff(dim=1) <= 0).all()
    assert (sorted_energy.sum(1).diff() <= 0).all()


def test_large_inputs_first_have_less_error_than_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    scales = np.exp(1.5 * draw.standard_normal(128)).astype(np.float32)
    seen, unseen = (inputs(400) * scales for _ in range(2))
    found, step = Hessian(128, 1), 0.1
    found.add(seen)

    def noise() -> float:
        codes = compensated_codes(WEIGHT, found.feedback(), lambda x: ((x / step).round(), (x / step).round() * step))
        return float(np.square(unseen @ (codes * np.float32(step) - WEIGHT).T).sum())

    ordered = noise()
    monkeypatch.setattr(module, "rounding_order", lambda energy, _: torch.arange(len(energy)))
    assert ordered < 0.8 * noise()


@pytest.mark.parametrize("rows", [1, 96])
def test_source_is_unchanged(rows: int) -> None:
    weight = WEIGHT[:rows].copy()
    gptq(weight, hessian(50).feedback(), AFFINE)
    np.testing.assert_array_equal(weight, WEIGHT[:rows])


def test_rows_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = hessian(400).feedback()
    whole = gptq(WEIGHT, feedback, AFFINE)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 40)
    for left, right in zip(whole, gptq(WEIGHT, feedback, AFFINE), strict=True):
        assert left.shape == right.shape
        assert (left == right).mean() > 0.99  # sums of other widths may round differently


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_few_tokens_give_finite_weights(tokens: int) -> None:
    """Without inputs the result is the fit of the groups."""
    found = gptq(WEIGHT, hessian(tokens).feedback(), AFFINE)
    assert np.isfinite(np.array(dequantized(found, AFFINE))).all()
    if tokens == 0:
        nearest = fitted(WEIGHT, AFFINE)
        np.testing.assert_array_equal(found.scales, nearest.scales)
        np.testing.assert_array_equal(found.weight, nearest.weight)


def test_wide_matrices_are_split_between_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SPAN", 50)
    assert list(spans(128, 32)) == [(0, 32), (32, 64), (64, 128)]
    found = gptq(WEIGHT, hessian(400).feedback(), AFFINE)
    assert noise_db(np.array(dequantized(found, AFFINE))) > 15
