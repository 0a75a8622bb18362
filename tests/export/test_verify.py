"""Verification sees what goes wrong with exports: each fault here is one that a user has met or could meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastvlm.export.exporter import export
from fastvlm.export.model_folder import file_table
from fastvlm.export.verify import verify
from fastvlm.models.errors import FastVLMError, ModelFolderError, VerificationError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(out=tmp_path_factory.mktemp("verify") / "model").folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes tensors, and signs the manifest anew: as if export itself had written them so."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    sign(folder)


def sign(folder: Path, **recipe: object) -> None:
    manifest = json.loads((folder / "fastvlm.json").read_text())
    manifest["files"] = file_table(folder)
    manifest["recipe"] |= recipe
    (folder / "fastvlm.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"])
def test_one_flipped_bit_is_seen(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-100] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"does not match its manifest in {name}"):
        verify(copy, "random:tiny")


def test_what_the_finder_leaves_is_passed_over_and_other_strays_are_not(copy: Path) -> None:
    (copy / ".DS_Store").write_bytes(b"\0")
    (copy / "fastvithd.mlpackage" / ".DS_Store").write_bytes(b"\0")
    assert verify(copy, "random:tiny").passed
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="does not match its manifest in model.safetensors.index.json"):
        verify(copy, "random:tiny")


def test_package_of_another_export_is_seen(copy: Path, tmp_path: Path) -> None:
    other = export(out=tmp_path / "other", quant="fp16").folder
    shutil.rmtree(copy / "fastvithd.mlpackage")
    shutil.copytree(other / "fastvithd.mlpackage", copy / "fastvithd.mlpackage")
    with pytest.raises(ModelFolderError, match="from different exports"):
        verify(copy, "random:tiny")


def test_decoder_beyond_float16_fails(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        layer = "language_model.model.layers.2.mlp"
        for part in ("scales", "biases"):  # as large as float16 holds, and undone behind the product
            tensors[f"{layer}.up_proj.{part}"] *= np.float16(60_000)
            tensors[f"{layer}.down_proj.{part}"] /= np.float16(60_000)

    edit_weights(copy, change)
    result = verify(copy, "random:tiny")
    assert result.decoder_largest_layer == 2
    assert any("decoder layer 2 reaches" in failure for failure in result.failures)


@pytest.mark.parametrize("image_size", [None, "256", 100])
def test_odd_recipes_are_one_line(copy: Path, image_size: object) -> None:
    sign(copy, image_size=image_size)
    with pytest.raises(FastVLMError, match="image size"):
        verify(copy, "random:tiny")


def test_a_good_folder_passes_with_the_figures_of_its_manifest(exported: Path) -> None:
    result = verify(exported, "random:tiny")
    assert result.passed
    assert result.as_dict() == json.loads((exported / "fastvlm.json").read_text())["parity"]


def test_nan_in_the_decoder_is_an_error(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["multi_modal_projector.linear_0.weight"][0, 0] = np.nan

    edit_weights(copy, change)
    with pytest.raises(VerificationError, match=r"logits: the export's output holds \d+ NaN"):
        verify(copy, "random:tiny")


def test_scrambled_projector_fails(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        weight = tensors["multi_modal_projector.linear_0.weight"]
        tensors["multi_modal_projector.linear_0.weight"] = weight[::-1].copy()

    edit_weights(copy, change)
    result = verify(copy, "random:tiny")
    assert not result.passed
    assert "logits reach" in result.failures[0]


def test_wrong_scale_of_one_layer_fails(copy: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["language_model.model.layers.1.mlp.down_proj.scales"] *= np.float16(1.5)
        tensors["language_model.model.layers.1.mlp.down_proj.biases"] *= np.float16(1.5)

    edit_weights(copy, change)
    assert not verify(copy, "random:tiny").passed


def test_another_checkpoints_package_fails(copy: Path, write_checkpoint: Callable) -> None:
    def change(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("convffn.fc1.weight"):
                tensors[name] = tensors[name].flip(0)

    result = verify(copy, write_checkpoint(change=change))
    assert not result.passed
    assert result.failures[0].startswith("image_features reach")
    assert len(result.failures) == 1  # the decoder is the same


@pytest.mark.parametrize("lost", ["fastvlm.json", "config.json", "fastvithd.mlpackage", "model.safetensors"])
def test_incomplete_folders_are_one_line(copy: Path, lost: str) -> None:
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FastVLMError) as caught:
        verify(copy, "random:tiny")
    assert "\n" not in str(caught.value)


def test_folder_without_a_manifest_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"fastvlm.json does not exist"):
        verify(tmp_path, "random:tiny")
