"""The checkpoint's encoder as the reference of an export, and the faults of an exported one that it must find."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.export.exporter import export
from fastvlm.export.rewrite import rewrite
from fastvlm.export.verify import verify
from fastvlm.export.verify_encoder import EncoderReference, encoder_reference, last_convolutions, reference_features
from fastvlm.models.errors import VerificationError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.random_checkpoint import TINY_ENCODER, RandomCheckpoint
from fastvlm.quant.calibration import verification_images
from fastvlm.quant.encoder import convolutions

from .edits import edit_package, swap_rows, weight_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("random:tiny", tmp_path_factory.mktemp("verify") / "model").folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


QKV = -8
"""The last attention's, in front of three other convolutions and the output's three."""


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


@pytest.mark.parametrize(("factor", "word"), [(1.02, "large"), (0.98, "small")])
def test_a_scale_of_the_package_that_is_off_by_two_percent_fails(copy: Path, factor: float, word: str) -> None:
    def change(numbers: np.ndarray) -> None:
        numbers *= np.float16(factor)

    edit_package(copy, weight_of(copy, QKV, "scale"), change)
    result = verify(copy, "random:tiny")
    assert result.encoder.output.snr_db > result.encoder_floor_db
    assert len(result.failures) == 1
    assert re.fullmatch(rf"encoder 19.qkv.weight is (1.9|2.0)% too {word}", result.failures[0])


def test_every_stage_is_compared(exported: Path) -> None:
    stages = json.loads((exported / "fastvlm.json").read_text())["parity"]["stages_snr_db"]
    assert list(stages) == ["stem", *(f"stage {index}" for index in range(5))]
    assert all(snr_db > 30 for snr_db in stages.values())
    assert stages["stem"] > 60  # all float16 up to here


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
