"""Recipes read from files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvlm.export.recipe import DECODER_FIELDS, read_recipe
from fastvlm.models.errors import UsageError
from fastvlm.quant.decoder_scheme import DecoderScheme
from fastvlm.quant.encoder_scheme import EncoderScheme

RECIPE: dict[str, Any] = {"quant": "mixed", "min_snr": 35, "weights": {"0.0": "fp16", "2.0": "pal6", "3": "int8"}}


def written(folder: Path, content: object, name: str = "recipe.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_recipe_is_read_alone_or_from_a_manifest(tmp_path: Path) -> None:
    alone = read_recipe(written(tmp_path, RECIPE))
    assert alone.encoder == EncoderScheme("mixed", 35.0, None, RECIPE["weights"])
    assert (alone.decoder, alone.image_size) == (None, None)
    decoder = {"bits": 4, "group_size": 32, "quantize_embeddings": False}
    full = {**RECIPE, "decoder": decoder, "image_size": 256, "stream_scales": [1.0]}
    manifest = written(tmp_path, {"format": 1, "recipe": full, "files": {}}, "fastvlm.json")
    for path in (manifest, tmp_path):
        saved = read_recipe(path)
        assert saved.encoder == alone.encoder
        assert saved.decoder == DecoderScheme(4, 32, False)
        assert saved.image_size == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant": 8}, r"'quant' must be of type str \(got 8\)"),
        ({"quant": None}, "'quant' must be of type str"),
        ({"quant": "int5"}, "quant must be one of"),
        ({"min_snr": "40"}, "'min_snr' must be of type float"),
        ({"min_snr": True}, "'min_snr' must be of type float"),
        ({"max_bytes": 1.5, "min_snr": None}, "'max_bytes' must be of type int"),
        ({"weights": None}, "'weights' must have the scheme of each convolution"),
        ({"weights": {}}, "'weights' must have the scheme of each convolution"),
        ({"weights": ["int8"]}, "'weights' must have the scheme of each convolution"),
        ({"weights": {"0.0": "mixed"}}, r"the scheme of '0.0' must be one of fp16, int8, .* \(got 'mixed'\)"),
        ({"weights": {"0.0": ["int8"]}}, "the scheme of '0.0' must be one of"),
        ({"layout": "mlx"}, "this export has the layout mlx, without a recipe for an encoder"),
        ({"calibration": "folder"}, r"'calibration' must be an object with source, images, sha256 \(got 'folder'\)"),
        ({"image_size": "256"}, "'image_size' must be of type int"),
        ({"decoder": {"bits": 4, "colour": "red"}}, "'decoder' must be an object with .*bits"),
        ({"decoder": {"bits": 3}}, "decoder_bits must be one of"),
        ({"decoder": [4]}, "'decoder' must be an object"),
        ({"decoder": {"layers": 1e308}}, r"'decoder' has a value of a wrong type \(layers is 1e"),
        ({"decoder": {"layers": {"lm_head": 8.0}}}, r"wrong type \(lm_head is 8.0"),
        ({"decoder": {"group_size": 64.0}}, r"wrong type \(group_size is 64.0"),
        ({"decoder": {"avg_bits": "5"}}, r"wrong type \(avg_bits is '5'"),
    ],
)
def test_invalid_recipe_is_refused_with_its_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = written(tmp_path, {**RECIPE, **change})
    with pytest.raises(UsageError, match=message) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_every_field_of_a_decoder_has_its_type() -> None:
    assert DECODER_FIELDS.keys() == {field.name for field in fields(DecoderScheme)}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"recipe": 3}'])
def test_file_that_is_not_a_recipe_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match="recipe.json"):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(UsageError, match="nowhere"):
        read_recipe(tmp_path / "nowhere")


def test_recipe_of_another_encoder_is_refused(tmp_path: Path) -> None:
    scheme = read_recipe(written(tmp_path, RECIPE)).encoder
    scheme.check_names({"0.0", "2.0", "3"})
    with pytest.raises(
        UsageError, match=r"recipe.json: the recipe is for another encoder \(1 unknown convolutions, such as 3\)"
    ):
        scheme.check_names({"0.0", "2.0"})
    with pytest.raises(UsageError, match=r"recipe.json: .* \(2 missing convolutions, such as 4, 5\)"):
        scheme.check_names({"0.0", "2.0", "3", "4", "5"})
