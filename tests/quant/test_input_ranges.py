"""The ranges of int8 inputs: least error, channels evened out by powers of two, zero points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.quant.input_ranges import (
    GELU_LEAST,
    PER_OCTAVE,
    STRENGTHS,
    InputRange,
    InputStatistics,
    Trade,
    chosen_range,
    input_ranges,
)


def statistics(x: np.ndarray, weight: np.ndarray, *, after_gelu: bool = False) -> InputStatistics:
    found = InputStatistics(weight.shape[1], weight.shape[0], after_gelu)
    for part in np.split(x, 4, axis=1):  # sums of several images
        found.add(part, weight @ part)
    return found


def noise_of_outputs(differences: np.ndarray, variances: np.ndarray) -> float:
    return float((np.square(differences).mean(1) / variances).sum())


def noise(x: np.ndarray, weight: np.ndarray, used: InputRange) -> float:
    """Returns the noise in the outputs, relative to their energy, when inputs are rounded and weights are not."""
    return float(np.square(weight @ (as_rounded(x, used) - x)).sum() / np.square(weight @ x).sum())


def as_rounded(x: np.ndarray, used: InputRange) -> np.ndarray:
    factors = np.exp2(np.array(used.exponents or [0] * len(x)))[:, None]
    levels = (np.rint(x / factors / float(used.scale)) + used.zero_point).clip(-128, 127)
    return (levels - used.zero_point) * float(used.scale) * factors


def reaching(x: np.ndarray) -> InputRange:
    """Returns the range to the largest value."""
    return InputRange(np.float16(np.abs(x).max() / 127))


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(7)


def test_unequal_channels_are_evened_out(draw: np.random.Generator) -> None:
    x = draw.standard_normal((8, 4096)) * 2.0 ** -np.arange(8)[:, None]
    weight = draw.standard_normal((16, 8)) * 2.0 ** np.arange(8)
    used = chosen_range(weight, statistics(x, weight), True)
    assert used is not None
    assert used.zero_point == 0
    assert np.abs(np.array(used.exponents) + np.arange(8)).max() <= 1, "each by its own range, of the same distribution"
    assert noise(x, weight, used) < 0.02 * noise(x, weight, reaching(x))


@pytest.mark.parametrize("seed", range(4))
def test_factors_of_single_channels_have_less_noise_than_powers_of_their_ranges(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((64, 2048)) * np.exp(2 * draw.standard_normal((64, 1)))
    weight = draw.standard_normal((32, 64)) * np.exp(draw.standard_normal(64))
    sums = statistics(x, weight)
    inputs, outputs = sums.variances
    importance = 1 / outputs
    noises = sums.noises()[1][:, ::PER_OCTAVE]
    trade = Trade(weight, inputs, importance, np.einsum("ij,ij,i->j", weight, weight, importance)[:, None] * noises)
    own = noises.argmin(1)
    least, places = trade.evened(own)
    assert least < 0.96 * min(trade.shifted(np.rint(strength * own).astype(int))[0] for strength in STRENGTHS)
    assert least == pytest.approx(trade.shifted(places)[0])
    used = chosen_range(weight, sums, True)
    assert used is not None
    factors = np.exp2(np.array(used.exponents))
    scales = np.abs(weight * factors).max(1, keepdims=True) / 127
    rounded = np.rint(weight * factors / scales) * scales / factors
    products = (weight @ x).var(1)
    measured = noise_of_outputs((rounded - weight) @ x, products) + noise_of_outputs(
        weight @ (as_rounded(x, used) - x), products
    )
    assert measured < 1.15 * least, "as predicted, and the best of the offsets"


def test_channels_that_have_to_stay_have_no_exponents(draw: np.random.Generator) -> None:
    x = draw.standard_normal((8, 4096)) * 2.0 ** -np.arange(8)[:, None]
    weight = draw.standard_normal((16, 8))
    used = chosen_range(weight, statistics(x, weight), False)
    assert used is not None
    assert used.exponents == ()


def test_equal_channels_stay(draw: np.random.Generator) -> None:
    x, weight = draw.uniform(-1, 1, (8, 4096)), draw.standard_normal((16, 8))
    used = chosen_range(weight, statistics(x, weight), True)
    assert used is not None
    assert used.exponents == ()


def test_rare_large_values_are_clipped_at_the_least_error(draw: np.random.Generator) -> None:
    x, weight = draw.standard_normal((8, 65536)), draw.standard_normal((16, 8))
    x[0, 0] = 20
    used = chosen_range(weight, statistics(x, weight), False)
    assert used is not None
    tried = [noise(x, weight, InputRange(np.float16(end / 127))) for end in np.arange(2, 21, 0.5)]
    assert noise(x, weight, used) < 1.05 * min(tried)
    assert noise(x, weight, used) < 0.3 * noise(x, weight, reaching(x))


def test_results_of_gelu_use_nearly_all_levels(draw: np.random.Generator) -> None:
    x = nn.functional.gelu(torch.from_numpy(3 * draw.standard_normal((8, 4096)))).numpy()
    weight = draw.standard_normal((16, 8))
    used = chosen_range(weight, statistics(x, weight, after_gelu=True), False)
    assert used is not None
    assert float(used.scale) * (used.zero_point + 128) == pytest.approx(GELU_LEAST, abs=float(used.scale))
    assert noise(x, weight, used) < 0.4 * noise(x, weight, reaching(x))


def test_inputs_of_tiny_values_have_no_range(draw: np.random.Generator) -> None:
    weight = draw.standard_normal((16, 8))
    for x in (1e-5 * draw.standard_normal((8, 64)), np.zeros((8, 64))):
        assert chosen_range(weight, statistics(x, weight), True) is None


def test_ranges_come_from_all_images_and_leave_no_hooks() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)).requires_grad_(False)
    images = [np.full((1, 3, 8, 8), value, np.float32) for value in (0.5, -0.75)]
    one, both = (input_ranges(network, ["0", "2"], ["2"], found) for found in (images[:1], images))
    assert list(both) == ["0", "2"]
    assert both["0"].scale > one["0"].scale
    assert both["2"].zero_point < 0 == both["0"].zero_point
    assert not network[0]._forward_hooks
