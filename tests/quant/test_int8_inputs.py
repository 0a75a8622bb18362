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

NOISES = st.tuples(st.floats(1e-9, 1e-2), st.floats(1e-9, 1e-2)).map(np.array)
COSTS = st.dictionaries(
    st.text("abcdefgh", min_size=1),
    st.builds(InputCost, noises=NOISES, multiplications=st.integers(1, 10**9)),
    min_size=1,
)


@given(COSTS, NOISES)
def test_choice_keeps_its_bounds(costs: dict[str, InputCost], limits: np.ndarray) -> None:
    kept = chosen_inputs(costs, limits)
    left = [cost for name, cost in costs.items() if name not in kept]
    total = sum(cost.multiplications for cost in costs.values())
    assert sum(cost.multiplications for cost in left) <= MAX_FLOAT16_SHARE * total
    noises = sum((costs[name].noises for name in kept), np.zeros(2))
    for cost in left:  # with any of them, an image has too much noise
        assert ((noises + cost.noises) > limits * (1 - 1e-9)).any()
    assert kept == [name for name in costs if name in kept], "in the order of the computation"


def test_noisiest_input_with_little_arithmetic_stays_float16() -> None:
    noises = {"fc1": (1.0, 20), "proj": (2.0, 5), "fc2": (2.5, 75)}
    costs = {name: InputCost(np.array([noise]), multiplications) for name, (noise, multiplications) in noises.items()}
    assert chosen_inputs(costs, np.array([6.0])) == ["fc1", "proj", "fc2"]
    assert chosen_inputs(costs, np.array([4.0])) == ["fc1", "fc2"]
    assert chosen_inputs(costs, np.array([3.0])) == ["fc2"]
    assert chosen_inputs(costs, np.array([0.1])) == ["fc2"], "the last has more arithmetic than may stay"


def test_image_with_little_noise_in_all_decides_for_itself() -> None:
    costs = {"fc1": InputCost(np.array([5.0, 0.1]), 10), "fc2": InputCost(np.array([1.0, 0.4]), 10)}
    assert chosen_inputs(costs, np.array([10.0, 0.2])) == ["fc1"]
    assert chosen_inputs(costs, np.array([5.5, 1.0])) == ["fc2"]


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
        assert costs[name].noises == pytest.approx([noise])
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
