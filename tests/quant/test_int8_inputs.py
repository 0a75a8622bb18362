"""The int8 inputs of w8a8: their rounding, and the choice of those that stay float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastvlm.quant.input_ranges import InputRange
from fastvlm.quant.int8_inputs import MAX_FLOAT16_SHARE, InputCost, chosen_inputs, input_costs, int8_inputs
from fastvlm.quant.search import noise_of, outputs

COSTS = st.dictionaries(
    st.text("abcdefgh", min_size=1),
    st.builds(InputCost, noise=st.floats(1e-9, 1e-2), multiplications=st.integers(1, 10**9)),
    min_size=1,
)


@given(COSTS, st.floats(1e-9, 1e-2))
def test_choice_keeps_its_bounds(costs: dict[str, InputCost], limit: float) -> None:
    kept = chosen_inputs(costs, limit)
    left = [cost for name, cost in costs.items() if name not in kept]
    total = sum(cost.multiplications for cost in costs.values())
    assert sum(cost.multiplications for cost in left) <= MAX_FLOAT16_SHARE * total
    if left:  # without the cheapest of them, the noise would be too large
        noise = sum(costs[name].noise for name in kept) + min(cost.noise for cost in left)
        assert noise > limit * (1 - 1e-9)
    assert kept == [name for name in costs if name in kept], "in the order of the computation"


def test_noisiest_input_with_little_arithmetic_stays_float16() -> None:
    costs = {"fc1": InputCost(1.0, 40), "proj": InputCost(2.0, 5), "fc2": InputCost(2.5, 55)}
    assert chosen_inputs(costs, limit=6.0) == ["fc1", "proj", "fc2"]
    assert chosen_inputs(costs, limit=4.0) == ["fc1", "fc2"]
    assert chosen_inputs(costs, limit=3.0) == ["fc2"]
    assert chosen_inputs(costs, limit=0.1) == ["fc2"], "the last has more than half of the arithmetic"


def test_cost_of_an_input_is_the_noise_of_it_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
    image = np.random.default_rng(0).random((1, 16, 6, 6), dtype=np.float32)
    ranges = {"0": InputRange(np.float16(1 / 127)), "2": InputRange(np.float16(0.01), -111)}
    costs = input_costs(network, ranges, [image])
    assert [cost.multiplications for cost in costs.values()] == [16 * 8 * 36, 8 * 9 * 8 * 36]
    plain = [outputs(network, image)]
    for name, used in ranges.items():
        with int8_inputs(network, {name: used}):
            noise = noise_of(plain, [outputs(network, image)])
        assert costs[name].noise == pytest.approx(noise)
        assert noise > 0
    np.testing.assert_array_equal(outputs(network, image), plain[0])


def test_zero_point_moves_the_range_and_keeps_zero() -> None:
    identity = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    identity.weight.fill_(1)
    network = nn.Sequential(identity)
    values = np.array([-0.2, -0.1, 0.0, 0.1, 2.3, 2.5], np.float32).reshape(1, 1, 1, 6)
    with int8_inputs(network, {"0": InputRange(np.float16(1 / 128), -112)}):
        found = outputs(network, values).ravel() * 128
    np.testing.assert_array_equal(found, [-16, -13, 0, 13, 239, 239])  # levels -128 to 127 around -112
