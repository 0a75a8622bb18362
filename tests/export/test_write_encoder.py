"""From a checkpoint to its package: what calibration decides, and the numbers that the executor computes from it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm.export.evening import even_channels
from fastvlm.export.exporter import export
from fastvlm.export.inspect_package import inspect
from fastvlm.export.recipe import PackageInterface, check_calibration, read_recipe
from fastvlm.export.rewrite import branch_convolutions, follow_gelu, rewrite, stream_maxima, stream_scales
from fastvlm.export.verify import rebuilt
from fastvlm.export.verify_encoder import audit_program
from fastvlm.export.write_encoder import convert_encoder, resized_inputs
from fastvlm.models.errors import PackageError, UsageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.folder_layout import INPUT_NAME, OUTPUT_NAME, PACKAGE_NAME
from fastvlm.models.mlprogram import Constants, census, read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.calibration import calibration_images, folder_images, trial_images
from fastvlm.quant.encoder import convolutions, quantize, stored_by_plan, stored_uniformly
from fastvlm.quant.input_ranges import InputRange, input_ranges
from fastvlm.quant.metrics import compare
from fastvlm.quant.range_images import range_images
from fastvlm.quant.schemes import MIN_WEIGHT_SNR_DB, is_candidate

pytestmark = pytest.mark.slow

CHECKPOINTS = ("llava_small_reparam_tied", "llava_small_train_untied")


def overflow_stage_2(tensors: dict[str, torch.Tensor]) -> None:
    """Stage 2's residual stream passes 65,504, and what reads it brings it back, as in trained weights."""
    readers = ("network.4.1.convffn.conv.conv.weight", "proj.0.lkb_origin.conv.weight", "small_conv.conv.weight")
    for name in tensors:
        if name.endswith(("network.4.0.layer_scale", "network.4.1.layer_scale")):
            tensors[name] *= 400_000
        if ("network.4." in name or "network.5." in name) and name.endswith(readers):
            tensors[name] /= 400_000


def test_rescaling_only_makes_an_overflowing_stream_finite(
    write_checkpoint: Callable, tolerance: Callable[[str], float], tmp_path: Path
) -> None:
    source = write_checkpoint(change=overflow_stage_2)
    image = torch.from_numpy(calibration_images(256)[0])
    with torch.no_grad():
        encoder = FastViT.from_checkpoint(open_checkpoint(source))
        expected = encoder(image).numpy()
        maxima = stream_maxima(encoder, [image])
        assert max(maxima) > 65504
        networks = {
            "plain": rewrite(FastViT.from_checkpoint(open_checkpoint(source)), 256),
            "rescaled": rewrite(FastViT.from_checkpoint(open_checkpoint(source)), 256, stream_scales(maxima)),
        }
        outputs = {name: network(image).numpy() for name, network in networks.items()}
    float32_change = np.abs(outputs["rescaled"] - outputs["plain"]).max() / np.abs(outputs["plain"]).max()
    assert float32_change <= tolerance("rescaled_stream_float32")

    runs = {}
    for name, network in networks.items():
        package = tmp_path / name / "fastvithd.mlpackage"
        convert_encoder(network, 256, {}, package, metadata={}, on_stage=lambda _: None)
        executor = Executor(package, precision="float16")
        runs[name] = executor.run({"images": image.numpy()})["image_features"]
        assert (executor.first_overflow is None) == (name == "rescaled")
    assert not np.isfinite(runs["plain"]).all()
    assert compare(expected, runs["rescaled"], "rescaled").snr_db >= tolerance("rescaled_package_snr_db")


def test_values_near_the_end_of_float16_are_noted(write_checkpoint: Callable, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        """Enlarges one feed-forward's results past a quarter of float16's range, where no rescaling helps."""
        for name in tensors:
            if name.endswith(("network.4.1.convffn.fc1.weight", "network.4.1.convffn.fc1.bias")):
                tensors[name] *= 15_000
            if name.endswith("network.4.1.convffn.fc2.weight"):
                tensors[name] /= 15_000

    result = export(write_checkpoint(change=enlarge), tmp_path / "model", quant="fp16", image_size=128)
    encoder = result.verification.encoder
    assert len(encoder.large) == 2  # fc1's result and its GELU's
    assert 65504 / 4 < max(encoder.large.values()) == max(encoder.ranges.values()) < 65504
    assert any(
        note.startswith("2 results inside the package pass a quarter of float16's range") for note in result.notes
    )
    plain = export("random:tiny", tmp_path / "plain", quant="fp16", image_size=128)
    assert plain.verification.encoder.notes == ()


@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
def test_w8a8_package_keeps_the_features(
    golden: Path, name: str, tolerance: Callable[[str], float], tmp_path: Path
) -> None:
    package, scales = write_w8a8(open_checkpoint(golden / name), tmp_path / "fastvithd.mlpackage")
    report = inspect(package)
    assert report.errors == ()
    assert len(scales) == 18  # two for each of five RepMixer blocks, four for each of two attention blocks
    assert report.operations["quantize"] == report.operations["dequantize"] == len(scales)
    assert sum(report.operations.values()) == 96 + 2 * len(scales)
    assert report.operations["transpose"] == 1
    numbers = np.load(golden / name / "expected.npz")
    executor = Executor(package, precision="float16", record_ranges=True)
    for case in range(3):
        found = executor.run({"images": numbers[f"{case}.pixel_values"]})["image_features"]
        agreement = compare(numbers[f"{case}.image_features"], found, f"{name} case {case}")
        assert agreement.snr_db > tolerance("package_w8a8_snr_db")
    integers = [op.outputs[0].name for op in executor.program.operations if op.kind == "quantize"]
    assert all(60 < executor.ranges[name] <= 128 for name in integers)  # int8 is made use of


def write_w8a8(checkpoint: object, package: Path) -> tuple[Path, dict[str, InputRange]]:
    calibration = calibration_images(256)
    with torch.no_grad():
        network = rewrite(FastViT.from_checkpoint(checkpoint), 256)
    names = branch_convolutions(network)
    ranges = input_ranges(network, names, follow_gelu(names), range_images(calibration, 256))
    even_channels(network, {name: used.exponents for name, used in ranges.items() if used.exponents})
    stored = stored_uniformly(network, "int8")
    quantize(network, stored, calibration)
    convert_encoder(network, 256, stored, package, metadata={}, on_stage=lambda _: None, int8_inputs=ranges)
    return package, ranges


def test_branch_convolutions_are_those_behind_a_layer_scale() -> None:
    with torch.no_grad():
        network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256)
    kinds = [name.rpartition(".")[2] for name in branch_convolutions(network)]
    assert kinds == ["fc1", "fc2"] * 5 + ["qkv", "proj", "fc1", "fc2"] * 2


def test_fastvithd_has_a_hundred_of_them() -> None:
    with torch.device("meta"), torch.no_grad():
        assert len(branch_convolutions(rewrite(FastViT(FastViTConfig()).eval(), 1024))) == 100


def test_scale_for_a_convolution_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with torch.no_grad():
        network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 128)
    with pytest.raises(PackageError, match="the program must have 1 int8 inputs, got 0"):
        convert_encoder(
            network,
            128,
            {},
            tmp_path / "a.mlpackage",
            metadata={},
            on_stage=lambda _: None,
            int8_inputs={"gone": InputRange(np.float16(0.1))},
        )


def test_w8a8_is_exported_calibrated_on_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    for index, pixels in enumerate(calibration_images(160).pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    result = export("random:tiny", tmp_path / "model", quant="w8a8", image_size=128, calibrate=folder)
    manifest = json.loads((result.folder / "fastvlm.json").read_text())
    assert manifest["recipe"]["quant"] == "w8a8"
    assert manifest["recipe"]["calibration"]["source"] == "folder"
    assert manifest["recipe"]["calibration"]["images"] == 4
    check_manifest_of_int8_inputs(result.folder, manifest["recipe"])
    assert any("images skipped: broken.jpg" in note for note in manifest["notes"])
    assert str(tmp_path) not in json.dumps(manifest)


def check_manifest_of_int8_inputs(folder: Path, recipe: dict[str, Any]) -> None:
    """Checks the entries of a w8a8 export, and that its weights need them to match the checkpoint's."""
    used = set(recipe["int8_inputs"])
    assert 6 < len(used) < 18  # the noisiest stay float16
    assert set(recipe["zero_points"]) == {name for name in used if name.endswith("fc2")}
    assert {name.rpartition(".")[2] for name in recipe["evened"]} <= {"fc1", "qkv", "proj"}
    assert set(recipe["evened"]) <= used
    program, checkpoint = read_package(folder / PACKAGE_NAME), RandomCheckpoint("tiny")
    assert audit_program(program, rebuilt(checkpoint, recipe)).failures == []
    for name in recipe["evened"]:
        others = {key: digits for key, digits in recipe["evened"].items() if key != name}
        assert audit_program(program, rebuilt(checkpoint, {**recipe, "evened": others})).failures, name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random:tiny` at 40 dB."""
    return export("random:tiny", out=tmp_path_factory.mktemp("mixed") / "model", quant="mixed").folder


def recipe_of(folder: Path) -> dict:
    return json.loads((folder / "fastvlm.json").read_text())["recipe"]


def test_mixed_keeps_its_floor_in_fewer_bytes_than_int8(mixed: Path) -> None:
    manifest = json.loads((mixed / "fastvlm.json").read_text())
    reached = manifest["parity"]["image_features"]
    assert reached["snr_db"] >= reached["floor_db"] == 40.0
    report = inspect(mixed)
    stored_in_int8 = 1_376_864  # of the same checkpoint, which reaches 36.7 dB there
    assert sum(report.weight_bytes.values()) < 0.9 * stored_in_int8
    assert report.errors == ()
    weights = recipe_of(mixed)["weights"]
    assert len(weights) == report.operations["conv"]
    assert sum(scheme != "fp16" for scheme in weights.values()) == report.compressed_weights


def test_replayed_recipe_gives_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    again = export("random:tiny", out=tmp_path / "again", recipe=mixed).folder
    assert contents(again) == contents(mixed)


def test_size_is_kept(mixed: Path, tmp_path: Path) -> None:
    folder = export("random:tiny", out=tmp_path / "model", quant="mixed", max_bytes="900k").folder
    assert sum(path.stat().st_size for path in (folder / "fastvithd.mlpackage").rglob("*") if path.is_file()) <= 900_000
    assert recipe_of(folder)["max_bytes"] == 900_000


def test_recipe_of_another_encoder_or_with_quant_is_refused(mixed: Path, tmp_path: Path) -> None:
    recipe = recipe_of(mixed)
    recipe["weights"]["99.conv"] = recipe["weights"].pop("3.convffn.fc1")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UsageError, match=r"recipe.json: .* \(1 unknown convolutions, such as 99.conv"):
        export("random:tiny", out=tmp_path / "model", recipe=tmp_path / "recipe.json")
    with pytest.raises(UsageError, match="Leave out quant"):
        export("random:tiny", out=tmp_path / "model", recipe=mixed, quant="int8")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decoder_bits": 6}, "decoder_bits"),
        ({"decoder_bits": 8}, "decoder_bits"),  # as the recipe has it: asked for all the same
        ({"group_size": 32}, "group_size"),
        ({"decoder_quantizer": "rtn"}, "decoder_quantizer"),
        ({"decoder_bits": "mixed", "decoder_avg_bits": 5.0}, "decoder_bits, decoder_avg_bits"),
        ({"quantize_embeddings": False}, "quantize_embeddings=False"),
    ],
)
def test_decoder_options_with_a_whole_recipe_are_refused(
    mixed: Path, tmp_path: Path, options: dict, named: str
) -> None:
    with pytest.raises(UsageError, match=f"recipe decides how the decoder's weights are stored. Leave out {named}.$"):
        export("random:tiny", out=tmp_path / "model", recipe=mixed, on_stage=pytest.fail, **options)


def pictures(folder: Path, *seeds: int) -> Path:
    """A folder of images of noise."""
    folder.mkdir()
    for seed in seeds:
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder


def test_recipe_wants_the_images_again_that_it_was_measured_on(tmp_path: Path) -> None:
    images, others = pictures(tmp_path / "images", 1, 2), pictures(tmp_path / "others", 3)
    model = export("random:tiny", tmp_path / "model", calibrate=images).folder
    again = partial(export, "random:tiny", tmp_path / "again", recipe=model)
    with pytest.raises(UsageError, match=r"was measured on 2 images of a folder. Pass that folder as calibrate.$"):
        again(on_stage=pytest.fail)
    with pytest.raises(UsageError, match=r"measured on 2 other images \(calibrate has 1\). Pass"):
        again(calibrate=others, on_stage=pytest.fail)
    assert contents(again(calibrate=images).folder) == contents(model)


def test_own_images_with_a_recipe_of_embedded_ones_are_accepted(mixed: Path, tmp_path: Path) -> None:
    check_calibration(read_recipe(mixed), folder_images(pictures(tmp_path / "own", 1), 256, "pad"), 256)


def test_decoder_options_apply_with_a_recipe_of_the_encoder_only(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"quant": "mixed", "weights": recipe_of(mixed)["weights"]}))
    folder = export("random:tiny", tmp_path / "model", recipe=tmp_path / "recipe.json", group_size=32).folder
    assert recipe_of(folder)["decoder"]["group_size"] == 32


@pytest.mark.parametrize("target", ["ios17", "ios18"])
def test_package_holds_exactly_the_numbers_that_were_stored(tmp_path: Path, target: str) -> None:
    network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256)
    candidates = [name for name, conv in convolutions(network).items() if is_candidate(conv.weight.numpy())]
    schemes = [scheme for scheme in MIN_WEIGHT_SNR_DB if target == "ios18" or scheme != "int4"]
    stored = stored_by_plan(network, dict(zip(candidates, cycle(schemes))))
    quantize(network, stored, ())
    package = tmp_path / "fastvithd.mlpackage"
    interface = PackageInterface(min_os=target)
    convert_encoder(network, 256, stored, package, metadata={}, on_stage=lambda _: None, interface=interface)
    program = read_package(package)
    found = [operation for operation in program.operations if operation.kind.startswith("constexpr_")]
    assert len(found) == len(stored)
    for operation, (name, weight) in zip(found, stored.items(), strict=True):
        assert name.replace(".", "_") in operation.name
        np.testing.assert_array_equal(Constants(program).decode(operation), weight.dense())


def test_pal4_for_ios18_has_tables_per_group_of_channels(tmp_path: Path) -> None:
    results = {
        min_os: export("tiny", tmp_path / min_os, quant="pal4", min_os=min_os, image_size=128)
        for min_os in ("ios17", "ios18")
    }
    snr_db = {min_os: result.verification.encoder.weights.least_snr_db for min_os, result in results.items()}
    assert snr_db["ios18"] > snr_db["ios17"] + 0.1
    for min_os, result in results.items():
        assert any(f"pal4 for {min_os}: computed here, not seen on the engine" in note for note in result.notes)
    rules = [{found.rule for found in inspect(result.folder).findings} for result in results.values()]
    assert ["4-bit palettes" in found for found in rules] == [True, False]
    again = export("tiny", tmp_path / "again", recipe=results["ios18"].folder)
    assert again.files == results["ios18"].files


def test_int4_is_refused_at_once_without_allow_lint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"int4.* breaks a rule of the Neural Engine.*allow_lint=True"):
        export("random:tiny", out=tmp_path / "model", quant="int4", on_stage=pytest.fail)


def test_allowed_broken_rules_are_in_the_manifest(tmp_path: Path) -> None:
    results = [export("random:tiny", tmp_path / name, quant="int4", allow_lint=True) for name in ("model", "again")]
    notes = json.loads((tmp_path / "model" / "fastvlm.json").read_text())["notes"]
    told = [note for note in notes if "breaks a rule of the Neural Engine, which was allowed: " in note]
    errors = inspect(tmp_path / "model").errors
    assert errors
    assert all(f"{error.rule}: {error.example}" in note for error, note in zip(errors, told, strict=True))
    assert list(results[0].notes) == notes  # which the command prints
    assert contents(tmp_path / "model") == contents(tmp_path / "again")


def test_resized_network_equals_one_written_for_that_size() -> None:
    written = {size: rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), size) for size in (128, 256)}
    small, large = (torch.from_numpy(trial_images(size)[0]) for size in (128, 256))
    expected = written[256](large)
    with resized_inputs(written[256], 256, 128):
        found = written[256](small)
    assert compare(written[128](small).numpy(), found.numpy(), "features").snr_db > 120
    np.testing.assert_array_equal(written[256](large), expected)


def write_package(source: object, scheme: str, package: Path, *, correct: bool = True) -> Path:
    network = rewrite(FastViT.from_checkpoint(source), 256)
    stored = stored_uniformly(network, scheme)
    quantize(network, stored, calibration_images(256) if correct else ())
    convert_encoder(network, 256, stored, package, metadata={"fastvlm.quant": scheme}, on_stage=lambda _: None)
    return package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """The package of a golden checkpoint in a scheme, made once."""
    made: dict[tuple[Path, str], Path] = {}

    def get(folder: Path, scheme: str) -> Path:
        if (folder, scheme) not in made:
            target = tmp_path_factory.mktemp("packages") / "fastvithd.mlpackage"
            made[folder, scheme] = write_package(open_checkpoint(folder), scheme, target)
        return made[folder, scheme]

    return get


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("scheme", ["fp16", "int8", "pal8", "pal6", "pal4"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_executed_package_matches_the_reference(
    golden: Path, package: Callable, tolerance: Callable[[str], float], name: str, scheme: str, precision: str
) -> None:
    numbers = np.load(golden / name / "expected.npz")
    executor = Executor(package(golden / name, scheme), precision=precision)
    for case in range(3):
        found = executor.run({INPUT_NAME: numbers[f"{case}.pixel_values"]})[OUTPUT_NAME]
        agreement = compare(numbers[f"{case}.image_features"], found, f"{name} case {case}")
        assert agreement.snr_db > tolerance(f"package_{scheme}_snr_db")
    assert executor.first_overflow is None


@pytest.fixture(scope="module")
def int8_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of `random:tiny` in int8."""
    return write_package(RandomCheckpoint("tiny"), "int8", tmp_path_factory.mktemp("int8") / "fastvithd.mlpackage")


def test_interface_is_what_the_clients_expect(int8_package: Path) -> None:
    program = read_package(int8_package)
    (images,), (features,) = program.inputs, program.outputs
    assert (images.name, tuple(images.shape), images.dtype) == ("images", (1, 3, 256, 256), "fp32")
    assert (features.name, tuple(features.shape), features.dtype) == ("image_features", (1, 16, 512), "fp32")
    assert program.spec_version == 8  # iOS 17
    assert census(program)["cast"] == 2
    assert census(program)["transpose"] == 1
    compressed = [op for op in program.operations if op.kind == "constexpr_affine_dequantize"]
    assert len(compressed) == len(
        stored_uniformly(rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256), "int8")
    )


def test_correcting_biases_removes_most_of_the_noise(int8_package: Path, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint("tiny")
    from fastvlm.export.verify_encoder import reference_features
    from fastvlm.quant.calibration import verification_images

    images = verification_images(256)[:-1]  # without noise, which biases were not corrected for
    expected = reference_features(FastViT.from_checkpoint(checkpoint), images)
    snr = {}
    plain = write_package(checkpoint, "int8", tmp_path / "plain.mlpackage", correct=False)
    for correct, package in ((False, plain), (True, int8_package)):
        executor = Executor(package)
        outputs = [executor.run({INPUT_NAME: image})[OUTPUT_NAME] for image in images]
        snr[correct] = compare(np.concatenate(expected), np.concatenate(outputs), "features").snr_db
    assert snr[True] > snr[False] + 3


def test_same_network_gives_the_same_bytes(int8_package: Path, tmp_path: Path) -> None:
    again = write_package(RandomCheckpoint("tiny"), "int8", tmp_path / "fastvithd.mlpackage")
    assert contents(again) == contents(int8_package)
    assert len(contents(again)) == 3


def test_weight_that_the_program_lacks_is_an_error(tmp_path: Path) -> None:
    network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256)
    stored = stored_uniformly(network, "int8")
    quantize(network, stored, ())
    renamed = {f"no.{name}" if name == "19.qkv" else name: weight for name, weight in stored.items()}
    with pytest.raises(PackageError, match="the program must have 21 compressed weights, got 20"):
        convert_encoder(network, 256, renamed, tmp_path / "a.mlpackage", metadata={}, on_stage=lambda _: None)


def test_weight_that_differs_from_its_stored_form_is_an_error(tmp_path: Path) -> None:
    network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 256)
    stored = stored_uniformly(network, "int8")
    quantize(network, stored, ())
    network.get_submodule("19.qkv").weight.data[0, 0] += 0.1
    with pytest.raises(PackageError, match="19.qkv: the weight in the program differs from the one stored"):
        convert_encoder(network, 256, stored, tmp_path / "a.mlpackage", metadata={}, on_stage=lambda _: None)


def test_conversion_is_silent_and_leaves_no_temporary_files(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with caplog.at_level(logging.DEBUG):
        write_package(RandomCheckpoint("tiny"), "int8", tmp_path / "out" / "fastvithd.mlpackage")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fastvithd.mlpackage"]
    assert tempfile.tempdir == str(elsewhere)
