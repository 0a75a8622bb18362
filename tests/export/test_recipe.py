"""Recipes: the interface of a package, recipes of files, and their repetition."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvlm
from fastvlm.export.exporter import Export, export
from fastvlm.export.inspect_package import inspect
from fastvlm.export.options import ExportOptions
from fastvlm.export.recipe import DECODER_FIELDS, PackageInterface, interface_for, planned_recipe, read_recipe
from fastvlm.export.rewrite import ProjectorConvs, projected, rewrite
from fastvlm.export.verify import verify
from fastvlm.export.write_encoder import convert_encoder
from fastvlm.models.errors import ImageError, UsageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.images import open_image, preprocess, to_pixel_values
from fastvlm.models.mlprogram import census, read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.program import inputs_for
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.calibration import verification_images
from fastvlm.quant.decoder_scheme import DecoderScheme
from fastvlm.quant.encoder_scheme import EncoderScheme
from fastvlm.quant.metrics import compare

pytestmark = pytest.mark.slow

RECIPE: dict[str, Any] = {"quant": "mixed", "min_snr": 35, "weights": {"0.0": "fp16", "2.0": "pal6", "3": "int8"}}


def written(folder: Path, content: object, name: str = "recipe.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format must be one of coreml, coreai, both"),
        ({"format": "coreai", "quant": "w8a8"}, r"has quant fp16, int8, pal8, pal6, pal4 \(got 'w8a8'\)"),
        ({"format": "both", "quant": "int4"}, r"\(got 'int4'\)"),
        ({"format": "both", "quant": "mixed"}, r"\(got 'mixed'\)"),
        ({"format": "both", "io": "image"}, "has io float32 or float16"),
        ({"format": "coreai", "min_os": "ios18"}, "min_os is about the Core ML package"),
        ({"format": "coreai", "encoder": "mlx"}, "format is about the Core ML package"),
    ],
)
def test_asset_that_cannot_be_written_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        planned_recipe(ExportOptions(**options), 256, None)
    assert set(options) >= {name for name in raised.value.arguments if name in ("format", "quant", "io", "min_os")}


def test_recipe_repeats_the_format(tmp_path: Path) -> None:
    plans = {"weights": {"0.0": "int8"}, "quant": "int8"}
    for form, written_format in (("coreai", {"format": "coreai"}), ("both", {"format": "both"}), ("coreml", {})):
        saved = read_recipe(written(tmp_path, {**plans, **written_format}))
        assert planned_recipe(ExportOptions(), 256, saved).format == form
        assert planned_recipe(ExportOptions(format="both"), 256, saved).format == "both"
    with pytest.raises(UsageError, match=r"\(got 'int4'\)"):
        blocks = read_recipe(written(tmp_path, {**plans, "weights": {"0.0": "int4"}}))
        planned_recipe(ExportOptions(format="coreai"), 256, blocks)


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


SIZE = 128


PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)


@pytest.fixture(scope="module")
def images() -> Sequence[np.ndarray]:
    return verification_images(SIZE)


@pytest.fixture(scope="module")
def features(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The checkpoint's features of `images`."""
    encoder = FastViT.from_checkpoint(RandomCheckpoint("tiny"))
    with torch.inference_mode():
        return [encoder(torch.from_numpy(image)).numpy() for image in images]


def write_package(interface: PackageInterface, package: Path) -> Path:
    checkpoint = RandomCheckpoint("tiny")
    projector = ProjectorConvs.from_checkpoint(checkpoint) if interface.with_projector else None
    encoder = FastViT.from_checkpoint(checkpoint)
    with torch.no_grad():
        network = rewrite(encoder, SIZE, pixel_scale=interface.pixel_scale, projector=projector)
    convert_encoder(network, SIZE, {}, package, metadata={}, on_stage=lambda _: None, interface=interface)
    return package


@pytest.mark.parametrize(
    ("interface", "dtypes", "casts", "spec_version"),
    [
        (PackageInterface("float32"), ("fp32", "fp32"), 2, 8),
        (PackageInterface("float16", "ios18"), ("fp16", "fp16"), 0, 9),
        (PackageInterface("image"), ("fp32", "fp32"), 2, 8),
        (PackageInterface("float16", with_projector=True), ("fp16", "fp16"), 0, 8),
    ],
    ids=str,
)
def test_package_has_the_requested_interface(
    interface: PackageInterface,
    dtypes: tuple[str, str],
    casts: int,
    spec_version: int,
    images: Sequence[np.ndarray],
    features: list[np.ndarray],
    tolerance: Callable[[str], float],
    tmp_path: Path,
) -> None:
    program = read_package(write_package(interface, tmp_path / "fastvithd.mlpackage"))
    (taken,), (given,) = program.inputs, program.outputs
    assert (taken.dtype, given.dtype) == dtypes
    assert program.image_inputs == ({"images": "RGB"} if interface.takes_image else {})
    assert given.name == ("image_embeds" if interface.with_projector else "image_features")
    assert program.spec_version == spec_version
    counts = census(program)
    assert (counts["cast"], counts["transpose"]) == (casts, 1)
    assert sum(counts.values()) - casts == (97 if interface.with_projector else 94)
    assert inspect(program.path).errors == ()

    executor = Executor(program, precision="float16")
    found = [executor.run(inputs_for(program, image))[given.name] for image in images]
    expected = projected(RandomCheckpoint("tiny"), features) if interface.with_projector else features
    agreement = compare(np.concatenate(expected), np.concatenate(found), str(interface))
    assert agreement.snr_db > tolerance("package_border_snr_db")


def test_projector_is_the_decoders_own(
    features: list[np.ndarray], language_side: Callable, tolerance: Callable[[str], float]
) -> None:
    from fastvlm.models._mlx import mx

    projector = language_side(RandomCheckpoint("tiny")).multi_modal_projector
    large = [10 * image_features for image_features in features]  # where an approximate GELU would show
    for mine, image_features in zip(projected(RandomCheckpoint("tiny"), large), large, strict=True):
        theirs = np.array(projector(mx.array(image_features)))
        assert np.abs(mine - theirs).max() < tolerance("projected_float32")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """`random:tiny` in fp16, as it is by default, and with every part of the interface changed."""
    folder = tmp_path_factory.mktemp("exports")
    options: dict[str, Any] = {"quant": "fp16", "decoder_bits": 16, "image_size": SIZE}
    return {
        "plain": export("random:tiny", folder / "plain", **options),
        "whole": export(
            "random:tiny",
            folder / "whole",
            io="image",
            min_os="ios18",
            with_projector=True,
            attention_tiles=2,
            **options,
        ),
    }


def test_answers_are_the_same_with_the_projector_in_the_package(
    exports: dict[str, Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = (fastvlm.load(exports[name].folder, backend="reference") for name in ("plain", "whole"))
    assert whole.engine.encoder.projected
    pixel_values = to_pixel_values(preprocess(open_image(PICTURE), SIZE, "pad"))
    assert whole.engine.encoder.encode(pixel_values).shape == (1, 4, 128)
    projectors = [vlm.engine.language.multi_modal_projector for vlm in (plain, whole)]
    computed: list[object] = []
    project = type(projectors[0]).__call__
    monkeypatch.setattr(type(projectors[0]), "__call__", lambda self, x: computed.append(self) or project(self, x))
    answers = [vlm.generate(PICTURE, "Describe the image.", max_tokens=12, ignore_eos=True) for vlm in (plain, whole)]
    assert answers[0].token_ids == answers[1].token_ids
    assert [sum(one is projector for one in computed) for projector in projectors] == [1, 0]


def test_manifest_has_the_interface_and_verify_reads_it(exports: dict[str, Export]) -> None:
    recipe = json.loads((exports["whole"].folder / "fastvlm.json").read_text())["recipe"]
    assert (recipe["io"], recipe["target"], recipe["with_projector"]) == ("image", "ios18", True)
    assert recipe["attention_tiles"] == 2
    assert "attention_tiles" not in json.loads((exports["plain"].folder / "fastvlm.json").read_text())["recipe"]
    assert recipe["calibration"]["source"] == "embedded"
    again = verify(exports["whole"].folder, "random:tiny")
    assert again.passed
    figures = again.as_dict()
    assert set(figures.pop("modes_snr_db")) == {"float16", "float16-accumulate"}  # which an export does not measure
    assert figures == exports["whole"].verification.as_dict()


def test_recipe_replays_the_whole_folder(exports: dict[str, Export], tmp_path: Path) -> None:
    again = export("random:tiny", tmp_path / "again", recipe=exports["whole"].folder)
    assert again.files == exports["whole"].files


def test_recipe_repeats_the_interface_unless_it_is_given() -> None:
    saved = {"io": "float16", "target": "ios18", "with_projector": True}
    assert interface_for(["int8"], saved=saved) == PackageInterface("float16", "ios18", True)
    assert interface_for(["int8"], "float32", "ios17", False, saved) == PackageInterface()
    assert interface_for(["int8"]) == PackageInterface()


@pytest.mark.parametrize("tiles", [3, 0, 2.0, "2", True])
def test_unknown_number_of_tiles_is_an_error(tiles: Any) -> None:
    with pytest.raises(UsageError, match=r"attention_tiles must be one of 1, 2, 4 \(got "):
        interface_for(["int8"], attention_tiles=tiles)
    assert interface_for(["int8"], saved={"attention_tiles": 4}).attention_tiles == 4


def test_int4_asks_for_the_system_that_has_it() -> None:
    assert interface_for(["int4"]).min_os == "ios18"
    assert interface_for(["mixed", "int4", "pal6"], saved={"target": "ios17"}).min_os == "ios18"
    with pytest.raises(UsageError, match="quant='int4' needs min_os='ios18'"):
        interface_for(["int4"], min_os="ios17")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io": "uint8"}, r"io must be one of float32, float16, image \(got 'uint8'\)"),
        ({"min_os": "ios16"}, r"min_os must be one of ios17, ios18 \(got 'ios16'\)"),
        ({"quant": "int4", "min_os": "ios17"}, "quant='int4' needs min_os='ios18'"),
    ],
)
def test_impossible_interfaces_are_refused_at_once(options: dict, message: str, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(UsageError, match=message):
        export("random:tiny", tmp_path / "model", on_stage=stages.append, **options)
    assert stages == []


def test_calibration_folder_without_images_is_refused_at_once(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(ImageError, match="has no readable image"):
        export("random:tiny", tmp_path / "model", calibrate=tmp_path, on_stage=stages.append)
    assert stages == []
