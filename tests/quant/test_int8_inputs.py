"""The int8 inputs of w8a8: scales by the largest input, and the choice of those that stay float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastvlm.quant.int8_inputs import (
    MAX_ADDED_NOISE,
    MAX_FLOAT16_SHARE,
    InputCost,
    chosen_inputs,
    input_costs,
    input_maxima,
    int8_inputs,
    int8_scales,
)
from fastvlm.quant.search import noise_of, outputs


@pytest.fixture
def pair() -> nn.Sequential:
    """Returns two convolutions, of which the first multiplies by -2 and the second takes its result."""
    pair = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1)).requires_grad_(False)
    pair[0].weight.copy_(-2 * torch.eye(3)[:, :, None, None])
    return pair


def images(*values: float) -> list[np.ndarray]:
    return [np.full((1, 3, 4, 4), value, np.float32) for value in values]


def test_maxima_are_magnitudes_over_all_images(pair: nn.Sequential) -> None:
    assert input_maxima(pair, ["0", "1"], images(0.5, -0.75, 0.25)) == {"0": 0.75, "1": 1.5}
    assert not pair[0]._forward_pre_hooks, "the pair is left without hooks"


def test_int8_reaches_the_largest_input(pair: nn.Sequential) -> None:
    scales = int8_scales(pair, ["0", "1"], images(0.5, 0.25))
    assert scales == {"0": np.float16(0.5 / 127), "1": np.float16(1.0 / 127)}


def test_tiny_inputs_stay_float16(pair: nn.Sequential) -> None:
    assert int8_scales(pair, ["0", "1"], images(1e-5)) == {}


COSTS = st.dictionaries(
    st.text("abcdefgh", min_size=1),
    st.builds(InputCost, noise=st.floats(1e-9, 1e-2), multiplications=st.integers(1, 10**9)),
    min_size=1,
)


@given(COSTS, st.floats(1e-9, 1e-2))
def test_choice_keeps_its_bounds(costs: dict[str, InputCost], weights_noise: float) -> None:
    kept = chosen_inputs(costs, weights_noise)
    left = [cost for name, cost in costs.items() if name not in kept]
    total = sum(cost.multiplications for cost in costs.values())
    assert sum(cost.multiplications for cost in left) <= MAX_FLOAT16_SHARE * total
    if left:  # without the cheapest of them, the noise would be too large
        noise = sum(costs[name].noise for name in kept) + min(cost.noise for cost in left)
        assert noise > MAX_ADDED_NOISE * weights_noise * (1 - 1e-9)
    assert kept == [name for name in costs if name in kept], "in the order of the computation"


def test_noisiest_input_with_little_arithmetic_stays_float16() -> None:
    costs = {"fc1": InputCost(1.0, 40), "proj": InputCost(2.0, 5), "fc2": InputCost(2.5, 55)}
    assert chosen_inputs(costs, weights_noise=1.0) == ["fc1", "fc2"]
    assert chosen_inputs(costs, weights_noise=2.0) == ["fc1", "proj", "fc2"]


def test_cost_of_an_input_is_the_noise_of_it_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
    image = np.random.default_rng(0).random((1, 16, 6, 6), dtype=np.float32)
    scales = {"0": np.float16(1 / 127), "2": np.float16(0.01)}
    costs = input_costs(network, scales, [image])
    assert [cost.multiplications for cost in costs.values()] == [16 * 8 * 36, 8 * 9 * 8 * 36]
    plain = [outputs(network, image)]
    for name, scale in scales.items():
        with int8_inputs(network, {name: scale}):
            noise = noise_of(plain, [outputs(network, image)])
        assert costs[name].noise == pytest.approx(noise)
        assert noise > 0
    np.testing.assert_array_equal(outputs(network, image), plain[0])
