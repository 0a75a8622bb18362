"""What an export may be asked for its encoder's weights, and recipes read from files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.quant.decoder_scheme import DecoderScheme
from fastvlm.quant.encoder_scheme import EncoderScheme, encoder_scheme, parsed_bytes
from fastvlm.quant.recipe import DECODER_FIELDS, read_recipe

RECIPE: dict[str, Any] = {"quant": "mixed", "min_snr": 35, "weights": {"0.0": "fp16", "2.0": "pal6", "3": "int8"}}


@pytest.mark.parametrize(
    ("text", "number"), [("80M", 80_000_000), ("80MB", 80_000_000), ("1.5g", 1_500_000_000), ("500 k", 500_000), (7, 7)]
)
def test_sizes_are_read_with_decimal_units(text: str | int, number: int) -> None:
    assert parsed_bytes(text) == number


@pytest.mark.parametrize("text", ["", "M", "-3", "80X", "8 0", "1e6", "80MM"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-bytes should be a number of bytes"):
        parsed_bytes(text)


def test_mixed_keeps_40_db_unless_told_otherwise() -> None:
    assert encoder_scheme("mixed").min_snr == 40
    assert encoder_scheme("mixed", 30.0).as_dict() == {"quant": "mixed", "min_snr": 30.0, "weights": {}}
    assert encoder_scheme("mixed", max_bytes="80M").as_dict() == {
        "quant": "mixed",
        "max_bytes": 80_000_000,
        "weights": {},
    }
    assert encoder_scheme(None) == EncoderScheme("int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("int8", 40.0), "--min-snr and --max-bytes go with --quant mixed; found --quant int8"),
        ((None, None, "80M"), "go with --quant mixed"),
        (("mixed", 40.0, "80M"), "contradict each other"),
        (("mixed", 70.0), "--min-snr should be between 5 and 55 dB; found 70"),
        (("mixed", float("nan")), "--min-snr should be between"),
        (("int5",), "--quant should be one of"),
    ],
)
def test_wrong_options_are_named(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder_scheme(*options)


def written(folder: Path, content: object, name: str = "recipe.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_recipe_is_read_alone_from_a_manifest_and_from_a_folder(tmp_path: Path) -> None:
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
        ({"quant": 8}, "'quant' should be of type str; found 8"),
        ({"quant": None}, "'quant' should be of type str"),
        ({"quant": "int5"}, "--quant should be one of"),
        ({"min_snr": "40"}, "'min_snr' should be of type float"),
        ({"min_snr": True}, "'min_snr' should be of type float"),
        ({"max_bytes": 1.5, "min_snr": None}, "'max_bytes' should be of type int"),
        ({"weights": None}, "'weights' should name the scheme of each convolution"),
        ({"weights": {}}, "'weights' should name the scheme of each convolution"),
        ({"weights": ["int8"]}, "'weights' should name the scheme of each convolution"),
        ({"weights": {"0.0": "mixed"}}, "the scheme of '0.0' should be one of fp16, int8, .*; found 'mixed'"),
        ({"weights": {"0.0": ["int8"]}}, "the scheme of '0.0' should be one of"),
        ({"layout": "mlx"}, "an export of layout mlx, which has no recipe of an encoder"),
        ({"calibration": "folder"}, "'calibration' should be an object with source, images, sha256; found 'folder'"),
        ({"image_size": "256"}, "'image_size' should be of type int"),
        ({"decoder": {"bits": 4, "colour": "red"}}, "'decoder' should be an object with .*bits"),
        ({"decoder": {"bits": 3}}, "--decoder-bits should be one of"),
        ({"decoder": [4]}, "'decoder' should be an object"),
        ({"decoder": {"layers": 1e308}}, "'decoder' holds a value of a wrong type: layers is 1e"),
        ({"decoder": {"layers": {"lm_head": 8.0}}}, "wrong type: lm_head is 8.0"),
        ({"decoder": {"group_size": 64.0}}, "wrong type: group_size is 64.0"),
        ({"decoder": {"avg_bits": "5"}}, "wrong type: avg_bits is '5'"),
    ],
)
def test_wrong_recipes_are_refused_with_the_file_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = written(tmp_path, {**RECIPE, **change})
    with pytest.raises(UsageError, match=message) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_every_field_of_a_decoder_has_its_type() -> None:
    assert DECODER_FIELDS.keys() == {field.name for field in fields(DecoderScheme)}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"recipe": 3}'])
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match="recipe.json"):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(UsageError, match="nowhere"):
        read_recipe(tmp_path / "nowhere")


def test_recipe_of_another_encoder_is_refused(tmp_path: Path) -> None:
    scheme = read_recipe(written(tmp_path, RECIPE)).encoder
    scheme.check_names({"0.0", "2.0", "3"})
    with pytest.raises(
        UsageError, match=r"recipe.json: a recipe for another encoder: 1 convolutions are unknown, as 3"
    ):
        scheme.check_names({"0.0", "2.0"})
    with pytest.raises(UsageError, match=r"recipe.json: .*: 2 convolutions are missing, as 4, 5"):
        scheme.check_names({"0.0", "2.0", "3", "4", "5"})
