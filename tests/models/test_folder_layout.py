"""The files of a model folder: its weights with and without an encoder in MLX, in one file and in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.errors import ModelFolderError, WeightsError
from fastvlm.models.folder_layout import has_mlx_encoder, saved_encoder, saved_weights, weight_files

NORM, CONV = "language_model.model.norm.weight", "vision_tower.vision_model.conv_exp.weight"


def write(folder: Path, tensors: dict[str, float], name: str = "model.safetensors") -> Path:
    mx.save_safetensors(str(folder / name), {key: mx.array([value]) for key, value in tensors.items()})
    return folder


def test_decoder_and_encoder_are_separated_by_name(tmp_path: Path) -> None:
    write(tmp_path, {NORM: 1.0, CONV: 2.0})
    assert {name: array.item() for name, array in saved_weights(tmp_path).items()} == {NORM: 1.0}
    assert {name: array.item() for name, array in saved_encoder(tmp_path).items()} == {"conv_exp.weight": 2.0}
    assert has_mlx_encoder(tmp_path)


def test_folder_without_encoder_tensors_has_none(tmp_path: Path) -> None:
    write(tmp_path, {NORM: 1.0})
    assert saved_encoder(tmp_path) == {}
    assert not has_mlx_encoder(tmp_path)


def test_folder_without_weights_has_no_encoder(tmp_path: Path) -> None:
    assert not has_mlx_encoder(tmp_path)


def test_shards_of_the_index_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path, {CONV: 2.0}, "b.safetensors")
    write(tmp_path, {NORM: 1.0}, "a.safetensors")
    index = {"weight_map": {CONV: "b.safetensors", NORM: "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert has_mlx_encoder(tmp_path)
    assert list(saved_weights(tmp_path)) == [NORM]


def test_folder_error_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="has no decoder"):
        weight_files(tmp_path)


def test_folder_error_when_the_index_is_empty(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelFolderError, match="'weight_map' is empty"):
        weight_files(tmp_path)


def test_weights_error_when_a_file_is_cut_off(tmp_path: Path) -> None:
    file = write(tmp_path, {NORM: 1.0, CONV: 2.0}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(WeightsError):
        saved_weights(tmp_path)
