"""The checkpoint's encoder as the reference of an export, and the faults of an exported one that it must find."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastvlm.cli.verify import ADVICE, verdict
from fastvlm.export.rewrite import rewrite, stream_maxima, stream_scales
from fastvlm.export.verify import ENCODER_FLOOR_DB, verify
from fastvlm.export.verify_encoder import (
    EncoderReference,
    EncoderVerification,
    encoder_reference,
    last_convolutions,
    reference_features,
    verify_encoder,
)
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.errors import VerificationError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.random_checkpoint import TINY_ENCODER, RandomCheckpoint
from fastvlm.quant.calibration import NOISE, verification_images
from fastvlm.quant.encoder import convolutions
from fastvlm.quant.metrics import WeightAudit

from .edits import edit_package, swap_rows, weight_of

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(random_tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_tiny, tmp_path / "model"))


QKV, FC1 = -8, -5
"""The last attention's, in front of three other convolutions and the output's three, and its first feed-forward one."""


def test_nan_in_the_package_is_an_error(copy: Path) -> None:
    def change(numbers: np.ndarray) -> None:
        numbers.flat[7] = np.nan

    edit_package(copy, weight_of(copy, 0), change)
    with pytest.raises(VerificationError, match=r"encoder 0.0.weight holds 1 NaN"):
        verify(copy, "random:tiny")


def test_nan_in_a_bias_of_the_package_is_an_error(copy: Path) -> None:
    def change(numbers: np.ndarray) -> None:
        numbers[0] = np.nan

    edit_package(copy, weight_of(copy, 5, "bias"), change)
    with pytest.raises(VerificationError, match="first at"):
        verify(copy, "random:tiny")


def test_two_swapped_channels_of_the_package_fail(copy: Path) -> None:
    for part in ("weight", "scale"):
        edit_package(copy, weight_of(copy, QKV, part), swap_rows)
    result = verify(copy, "random:tiny")
    assert result.encoder.output.snr_db > result.encoder_floor_db  # the output alone does not tell
    assert result.failures == ["encoder 19.qkv.weight differs in 2 of 768 rows (the first: 3)"]


@pytest.mark.parametrize(
    "change", [lambda bias: bias.fill(0), lambda bias: bias.put(range(len(bias)), np.roll(bias, 1))]
)
def test_missing_or_shifted_bias_of_the_package_fails(copy: Path, change: Callable[[np.ndarray], None]) -> None:
    edit_package(copy, weight_of(copy, FC1, "bias"), change)
    result = verify(copy, "random:tiny")
    assert result.encoder.output.snr_db > result.encoder_floor_db
    failure = "encoder 19.convffn.fc1.bias is missing, or differs by more than rounding explains"
    assert result.failures == [failure]
    assert verdict(result) == f"failed: {failure}. {ADVICE}"
    alone = replace(result, encoder_floor_db=100.0, encoder=replace(result.encoder, weights=WeightAudit()))
    assert verdict(alone).startswith("failed: image_features") and not verdict(alone).endswith(ADVICE)


@pytest.mark.parametrize(("factor", "word"), [(1.02, "large"), (0.98, "small")])
def test_a_scale_of_the_package_that_is_off_by_two_percent_fails(copy: Path, factor: float, word: str) -> None:
    def change(numbers: np.ndarray) -> None:
        numbers *= np.float16(factor)

    edit_package(copy, weight_of(copy, QKV, "scale"), change)
    result = verify(copy, "random:tiny")
    assert result.encoder.output.snr_db > result.encoder_floor_db
    assert len(result.failures) == 1
    assert re.fullmatch(rf"encoder 19.qkv.weight is (1.9|2.0)% too {word}", result.failures[0])


def test_every_stage_is_compared(random_tiny: Path) -> None:
    stages = json.loads((random_tiny / "fastvlm.json").read_text())["parity"]["stages_snr_db"]
    assert list(stages) == ["stem", *(f"stage {index}" for index in range(5))]
    assert all(snr_db > 30 for snr_db in stages.values())
    assert stages["stem"] > 60  # all float16 up to here


def test_first_image_is_measured_with_sums_in_float16_too(random_tiny: Path) -> None:
    result = verify(random_tiny, "random:tiny")
    found = result.encoder.modes
    assert list(found) == ["float16", "float16-accumulate"]
    assert found["float16"] != found["float16-accumulate"]
    assert all(snr_db is not None and snr_db > ENCODER_FLOOR_DB["fp16"] for snr_db in found.values())
    assert result.as_dict()["modes_snr_db"] == {name: round(snr_db or 0, 1) for name, snr_db in found.items()}


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


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """A small encoder with the ranges of the published 0.5B, its images, and the scales of an export."""
    encoder = FastViT.from_checkpoint(RandomCheckpoint("small-0.5b"))
    images = verification_images(128)
    with torch.inference_mode():
        pictures, noise = map(torch.from_numpy, images[:-1]), [torch.from_numpy(images[-1])]
        scales = stream_scales(stream_maxima(encoder, pictures), stream_maxima(encoder, noise))
    return {"reference": encoder_reference(encoder, images), "images": images, "scales": scales}


def verified(
    published: dict[str, Any], package: Path, change: Callable[[nn.Sequential], None], scales: list[float]
) -> EncoderVerification:
    """Writes the encoder with `scales` and a `change`, and compares the package with the unchanged one."""
    with torch.no_grad():
        right, changed = (
            rewrite(FastViT.from_checkpoint(RandomCheckpoint("small-0.5b")), 128, chosen)
            for chosen in (published["scales"], scales)
        )
        change(changed)
    convert_encoder(changed, 128, {}, package, metadata={}, on_stage=lambda _: None)
    reference = published["reference"]
    return verify_encoder(package, published["images"], reference, reference.features, right, published["scales"])


def forget_to_unscale(network: nn.Sequential) -> None:
    """The head reads a stream that is 32 times smaller than it was trained on."""
    head = network[-2].conv
    head.weight.data *= 1 / 32


def swap_blocks(network: nn.Sequential) -> None:
    network[10], network[11] = network[11], network[10]


def shift_weights(network: nn.Sequential) -> None:
    fc1 = network[10].convffn.fc1
    fc1.weight.data = fc1.weight.data.roll(1, 0)


def is_accepted(found: EncoderVerification) -> bool:
    """Returns whether an export with these figures is accepted, as far as the encoder goes."""
    images = [agreement.snr_db for kind, agreement in found.kinds.items() if kind != NOISE]
    return min(images) >= ENCODER_FLOOR_DB["fp16"] and not found.weights.failures


def test_right_export_of_published_ranges_is_accepted(published: dict[str, Any], tmp_path: Path) -> None:
    found = verified(published, tmp_path / "a.mlpackage", lambda _: None, published["scales"])
    assert published["scales"][-1] < 1
    assert is_accepted(found)
    assert list(found.kinds) == list(found.load) == ["drawings", "photographs", "noise"]
    assert found.kinds["noise"].snr_db > 45
    assert list(found.load["noise"]) == ["stem", *(f"stage {index}" for index in range(5)), "head"]
    assert 0.05 < found.load["noise"]["stage 4"] < 0.7
    assert found.load["photographs"]["stage 4"] < found.load["noise"]["stage 4"]
    assert found.notes == ()


@pytest.mark.parametrize("change", [forget_to_unscale, swap_blocks, shift_weights])
def test_wrong_export_of_published_ranges_is_refused(
    published: dict[str, Any], tmp_path: Path, change: Callable[[nn.Sequential], None]
) -> None:
    found = verified(published, tmp_path / "a.mlpackage", change, published["scales"])
    assert found.output.snr_db < ENCODER_FLOOR_DB["fp16"]
    assert found.weights.failures


def test_noise_that_overflows_without_stream_scales_is_noted(published: dict[str, Any], tmp_path: Path) -> None:
    found = verified(published, tmp_path / "a.mlpackage", lambda _: None, [1.0] * 5)
    assert "noise" not in found.kinds
    assert not found.load["noise"]["stage 4"] < 1
    assert found.load["photographs"]["stage 4"] < 1
    assert found.notes[-1] == "standard-normal noise overflows float16 in stage 4, but no image does"
