"""The checkpoint's encoder as the reference of an export."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvlm.export.encoder_reference import EncoderReference, encoder_reference, last_convolutions, reference_features
from fastvlm.export.rewrite import rewrite
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.random_checkpoint import TINY_ENCODER, RandomCheckpoint
from fastvlm.quant.calibration import verification_images
from fastvlm.quant.encoder import convolutions


@pytest.fixture(scope="module")
def encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(verification_images(128))[:2]


@pytest.fixture(scope="module")
def reference(encoder: FastViT, images: list[np.ndarray]) -> EncoderReference:
    return encoder_reference(encoder, images)


def test_features_are_those_of_the_whole_encoder(
    encoder: FastViT, images: list[np.ndarray], reference: EncoderReference
) -> None:
    for found, expected in zip(reference.features, reference_features(encoder, images), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_stages_halve_the_grid(reference: EncoderReference) -> None:
    sides = [stage.shape[-1] for stage in reference.stages.values()]
    assert list(reference.stages) == ["stem", *(f"stage {index}" for index in range(5))]
    assert sides == [32, 32, 16, 8, 4, 2]


@pytest.mark.parametrize("tiny", [True, False])
def test_three_convolutions_follow_the_last_stage(tiny: bool) -> None:
    config = TINY_ENCODER if tiny else FastViTConfig()
    with torch.device("meta"), torch.no_grad():
        count = len(convolutions(rewrite(FastViT(config).eval(), 128)))
    assert last_convolutions(config)["stage 4"] == count - 1 - 3  # conv_exp, and two of squeeze and excitation
