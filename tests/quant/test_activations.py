"""The int8 inputs of convolutions: their measured ranges and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.quant.activations import input_maxima, int8_scales


@pytest.fixture
def network() -> nn.Sequential:
    """Returns two convolutions, of which the first multiplies by -2 and the second takes its result."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1)).requires_grad_(False)
    network[0].weight.copy_(-2 * torch.eye(3)[:, :, None, None])
    return network


def images(*values: float) -> list[np.ndarray]:
    return [np.full((1, 3, 4, 4), value, np.float32) for value in values]


def test_maxima_are_magnitudes_over_all_images(network: nn.Sequential) -> None:
    assert input_maxima(network, ["0", "1"], images(0.5, -0.75, 0.25)) == {"0": 0.75, "1": 1.5}
    assert not network[0]._forward_pre_hooks, "the network is left without hooks"


def test_int8_reaches_the_largest_input(network: nn.Sequential) -> None:
    scales = int8_scales(network, ["0", "1"], images(0.5, 0.25))
    assert scales == {"0": np.float16(0.5 / 127), "1": np.float16(1.0 / 127)}


def test_tiny_inputs_stay_float16(network: nn.Sequential) -> None:
    assert int8_scales(network, ["0", "1"], images(1e-5)) == {}
