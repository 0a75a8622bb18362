"""The verification of exported folders, with faults that users have met or could meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvlm.export.exporter import export
from fastvlm.export.verify import verify
from fastvlm.models.errors import FastVLMError, ImageError, ModelFolderError

from .edits import sign

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("random:tiny", tmp_path_factory.mktemp("verify") / "model").folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"])
def test_one_flipped_bit_is_seen(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-100] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"does not match its manifest in {name}"):
        verify(copy, "random:tiny")


def test_hidden_files_are_skipped_and_other_strays_are_not(copy: Path) -> None:
    (copy / ".DS_Store").write_bytes(b"\0")
    (copy / "fastvithd.mlpackage" / ".DS_Store").write_bytes(b"\0")
    assert verify(copy, "random:tiny").passed
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="does not match its manifest in model.safetensors.index.json"):
        verify(copy, "random:tiny")


def test_package_of_another_export_is_seen(copy: Path, tmp_path: Path) -> None:
    other = export("random:tiny", tmp_path / "other", quant="fp16").folder
    shutil.rmtree(copy / "fastvithd.mlpackage")
    shutil.copytree(other / "fastvithd.mlpackage", copy / "fastvithd.mlpackage")
    with pytest.raises(ModelFolderError, match="from different exports"):
        verify(copy, "random:tiny")


@pytest.mark.parametrize("image_size", [None, "256", 100])
def test_odd_recipes_are_one_line(copy: Path, image_size: object) -> None:
    sign(copy, image_size=image_size)
    with pytest.raises(FastVLMError, match="image_size"):
        verify(copy, "random:tiny")


def test_a_good_folder_passes_with_the_figures_of_its_manifest(exported: Path) -> None:
    result = verify(exported, "random:tiny")
    assert result.passed
    assert result.as_dict() == json.loads((exported / "fastvlm.json").read_text())["parity"]


def test_stale_package_with_newer_weights_fails_even_if_signed(copy: Path, write_checkpoint: Callable) -> None:
    """A round of training moved the encoder by a twentieth; the package was forgotten."""
    generator = torch.Generator().manual_seed(0)

    def train(tensors: dict) -> None:
        for name, tensor in tensors.items():
            if "vision_tower" in name and tensor.ndim > 1:
                tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    result = verify(copy, write_checkpoint(change=train))
    assert not result.passed
    assert result.failures[0].startswith("encoder ")
    assert "more weights differ" in result.failures[4]
    assert result.decoder.weights.failures == []


def test_another_checkpoints_package_fails(copy: Path, write_checkpoint: Callable) -> None:
    def change(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("convffn.fc1.weight"):
                tensors[name] = tensors[name].flip(0)

    result = verify(copy, write_checkpoint(change=change))
    assert not result.passed
    assert any(failure.startswith("image_features reach") for failure in result.failures)
    assert result.decoder.weights.failures == []


def test_images_of_a_folder_are_verified_on(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a folder"):
        verify(copy, "random:tiny", images=tmp_path / "none")
    samples = Path(__file__).resolve().parents[2] / "runtime" / "samples"
    result = verify(copy, "random:tiny", images=samples)
    assert result.passed
    assert result.as_dict() != json.loads((copy / "fastvlm.json").read_text())["parity"]


@pytest.mark.parametrize("lost", ["fastvlm.json", "config.json", "fastvithd.mlpackage", "model.safetensors"])
def test_incomplete_folders_are_one_line(copy: Path, lost: str) -> None:
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FastVLMError) as caught:
        verify(copy, "random:tiny")
    assert "\n" not in str(caught.value)


def test_folder_without_a_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"fastvlm.json does not exist"):
        verify(tmp_path, "random:tiny")
