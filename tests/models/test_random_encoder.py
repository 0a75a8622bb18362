"""Random encoders reach the published ranges, and fail in plain float16 as the published ones do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.random_encoder import LARGEST_CONV_EXP_WEIGHT, PUBLISHED_RANGES, part_stages
from fastvlm.models.tensor_names import APPLE_ENCODER_PREFIX
from fastvlm.quant.calibration import verification_images
from fastvlm.quant.search import Float16Results, rounded

SMALL = [size for size in PUBLISHED_RANGES if size.startswith("small-")]


def weight(checkpoint: RandomCheckpoint, name: str) -> np.ndarray:
    return checkpoint.read(APPLE_ENCODER_PREFIX + name, "pt")


def encoder_of(size: str) -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint(size))


def up_to_network_9(encoder: FastViT, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        x = encoder.patch_embed(image)
        for part in encoder.network[:10]:
            x = part(x)
    return x


def standard_normal(image_size: int) -> torch.Tensor:
    """The input of the published measurement."""
    torch.manual_seed(0)
    return torch.randn(1, 3, image_size, image_size)


@pytest.mark.parametrize("size", SMALL)
def test_small_encoders_reach_the_published_maxima(size: str) -> None:
    found = float(up_to_network_9(encoder_of(size), standard_normal(256)).abs().max())
    assert found == pytest.approx(PUBLISHED_RANGES[size].largest, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.5b"])
def test_full_encoder_reaches_the_published_maximum(size: str) -> None:
    found = float(up_to_network_9(encoder_of(size), standard_normal(1024)).abs().max())
    assert found == pytest.approx(PUBLISHED_RANGES[size].largest, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED_RANGES)
def test_largest_weight_of_conv_exp_is_the_published_one(size: str) -> None:
    found = np.abs(weight(RandomCheckpoint(size), "conv_exp.reparam_conv.weight")).max()
    assert found == LARGEST_CONV_EXP_WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize(("size", "fails"), [("small-0.5b", True), ("small-7b", False)])
def test_plain_float16_fails_on_noise_and_not_on_photographs(size: str, fails: bool) -> None:
    encoder, images = encoder_of(size), verification_images(256)
    finite = {}
    for image, kind in zip(images, images.kinds, strict=True):
        with torch.inference_mode(), Float16Results():
            x = rounded(encoder(rounded(torch.from_numpy(image))))
        finite[kind] = finite.get(kind, True) and bool(torch.isfinite(x).all())
    assert finite["photographs"]
    assert finite["noise"] != fails


@pytest.mark.slow
def test_dense_weights_have_heavy_tails_and_unequal_rows() -> None:
    """The medians of PP-OCRv4's detector and recognizer are 2.6 and 8.0, 0.37 and 0.57."""
    found = weight(RandomCheckpoint("0.5b"), "network.4.3.convffn.fc1.weight").reshape(1536, -1).astype(np.float64)
    spread = found.std(1)
    rows = found / spread[:, None]
    assert 2.6 < float((rows**4).mean() - 3) < 8.0
    assert 0.37 < np.log(spread).std() < 0.57
    assert np.abs(rows).max() < 22


def test_last_stream_has_channels_of_a_thousand_times_the_median() -> None:
    encoder = encoder_of("small-0.5b")
    channels = up_to_network_9(encoder, torch.from_numpy(verification_images(256)[2])).abs().amax((0, 2, 3))
    assert channels.max() > 100 * channels.median() > 1000 * channels.min()


def test_sizes_are_different_towers() -> None:
    name = "network.4.0.convffn.fc1.weight"
    first, second, third = (weight(RandomCheckpoint(size), name) for size in SMALL)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    np.testing.assert_array_equal(first, weight(RandomCheckpoint(SMALL[0]), name))


@pytest.mark.slow
def test_part_of_a_stage_is_counted_with_its_downsampling() -> None:
    stages = part_stages(RandomCheckpoint("0.5b").encoder)
    assert stages == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 4, 9: 4, 10: 4}
