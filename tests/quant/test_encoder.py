"""The encoder's convolutions in fewer bits: plans, stored weights and corrected biases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.quant.encoder import (
    Rounding,
    compensated,
    convolutions,
    input_means,
    nearest_level,
    plan_of,
    quantize,
    stored_by_plan,
    stored_uniformly,
    with_codes,
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


@pytest.mark.parametrize("scheme", ["int8", "pal8", "pal6"])
def test_compensated_weights_keep_products_better(network: nn.Sequential, scheme: str) -> None:
    mix = DRAW.standard_normal((64, 64), dtype=np.float32) * np.exp(-np.arange(64, dtype=np.float32) / 8)
    images = [np.einsum("ij,bjhw->bihw", mix, image) for image in IMAGES]
    expected = [network[0](torch.from_numpy(image)) for image in images]
    nearest = stored_by_plan(network, {"0": scheme})
    found = compensated(network, nearest, images)
    assert found["0"].nbytes == nearest["0"].nbytes
    weight, bias = network[0].weight.data, network[0].bias.data
    noises = []
    for stored in (nearest, found):
        network[0].weight.data, network[0].bias.data = weight, bias
        quantize(network, stored, images)
        outputs = [network[0](torch.from_numpy(image)) for image in images]
        noises.append(sum(float((y - x).square().sum()) for x, y in zip(expected, outputs, strict=True)))
    assert noises[1] < 0.5 * noises[0]


def test_rounding_keeps_a_weight_for_the_plans_that_follow(network: nn.Sequential) -> None:
    rounding = Rounding(network, ["0", "2"], IMAGES)
    first, second = (rounding.by_plan({"0": "int8", "2": scheme}) for scheme in ("fp16", "pal4"))
    assert first.keys() == {"0"}
    assert first["0"] is second["0"]
    expected = compensated(network, stored_by_plan(network, {"0": "int8", "2": "pal4"}), IMAGES)
    for name, kept in second.items():
        np.testing.assert_array_equal(kept.dense(), expected[name].dense())
    nearest = stored_by_plan(network, {"0": "int8"})["0"]
    assert (first["0"].dense() != nearest.dense()).any()


def test_coarse_palettes_and_larger_kernels_are_not_compensated(network: nn.Sequential) -> None:
    wide = nn.Sequential(nn.Conv2d(64, 64, 3)).requires_grad_(False)
    for net, scheme in ((network, "pal4"), (wide, "int8")):
        stored = stored_by_plan(net, {"0": scheme})
        assert compensated(net, stored, IMAGES)["0"] is stored["0"]


def test_palette_whose_small_rows_would_drown_is_not_compensated(network: nn.Sequential) -> None:
    network[0].weight.data[5] *= 3e-3
    stored = stored_by_plan(network, {"0": "pal6"})
    assert compensated(network, stored, IMAGES)["0"] is stored["0"]


@pytest.mark.parametrize("scheme", ["int8", "pal6"])
def test_nearest_level_is_that_of_the_stored_weight(network: nn.Sequential, scheme: str) -> None:
    network[0].weight.data[3] = 0  # its scale is 0
    network[0].weight.data = network[0].weight.data.half().float()  # as palettes are fitted
    stored = stored_by_plan(network, {"0": scheme})["0"]
    pairs = [nearest_level(stored)(column) for column in network[0].weight.data[:, :, 0, 0].mT]
    values = torch.stack([value for _, value in pairs], 1).half().float().numpy()  # (64, 64)
    np.testing.assert_array_equal(values, stored.dense()[:, :, 0, 0])
    codes = torch.stack([code for code, _ in pairs], 1).numpy()
    np.testing.assert_array_equal(with_codes(stored, codes[:, :, None, None]).dense(), stored.dense())


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
