"""The encoder's convolutions in fewer bits: plans, stored weights and corrected biases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.quant.encoder import (
    convolutions,
    input_means,
    plan_of,
    quantize,
    stored_by_plan,
    stored_uniformly,
)

DRAW = np.random.default_rng(4)
IMAGES = [DRAW.random((1, 64, 8, 8), dtype=np.float32) for _ in range(2)]
"""Inputs with means far from zero, as after a GELU."""


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 64, 1), nn.GELU(), nn.Conv2d(64, 8, 1, groups=8)).requires_grad_(False).eval()


def test_convolutions_are_in_the_order_of_the_computation(network: nn.Sequential) -> None:
    assert list(convolutions(network)) == ["0", "2"]


def test_plan_has_float16_for_weights_that_are_not_stored(network: nn.Sequential) -> None:
    assert plan_of(network, stored_uniformly(network, "pal6")) == {"0": "pal6", "2": "fp16"}
    assert stored_by_plan(network, {"0": "pal4", "2": "fp16"}).keys() == {"0"}


def test_means_are_over_images_and_positions(network: nn.Sequential) -> None:
    means = input_means(network, ["0"], IMAGES)["0"]
    np.testing.assert_allclose(means.numpy(), np.mean(IMAGES, axis=(0, 1, 3, 4)), rtol=1e-5)
    assert input_means(network, [], IMAGES) == {}


def test_corrected_biases_keep_the_mean_output(network: nn.Sequential) -> None:
    conv = network[0]

    def mean_output() -> np.ndarray:
        return np.mean([conv(torch.from_numpy(image)).numpy() for image in IMAGES], axis=(0, 1, 3, 4))

    original, weight, bias = mean_output(), conv.weight.data, conv.bias.data
    stored = stored_by_plan(network, {"0": "pal4", "2": "fp16"})
    shifts = []
    for images in ([], IMAGES):
        conv.weight.data, conv.bias.data = weight, bias
        quantize(network, stored, images)
        np.testing.assert_array_equal(conv.weight.data.numpy(), stored["0"].dense())
        shifts.append(float(np.abs(mean_output() - original).max()))
    assert shifts[0] > 1e-3
    assert shifts[1] < 1e-5


def test_weight_with_rows_of_unequal_size_is_stored_per_row() -> None:
    """The largest rows would take all values of a palette."""
    draw = np.random.default_rng(0)
    network = nn.Sequential(nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 1)).requires_grad_(False)
    for conv in network:
        conv.weight.data = torch.from_numpy(draw.standard_normal(conv.weight.shape, dtype=np.float32))
    network[0].weight.data *= torch.logspace(-3, 3, 256)[:, None, None, None]
    stored = stored_uniformly(network, "pal8")
    assert {name: weight.scheme for name, weight in stored.items()} == {"0": "int8", "1": "pal8"}
    assert list(stored_uniformly(network, "int8", spared=["0"])) == ["1"]
