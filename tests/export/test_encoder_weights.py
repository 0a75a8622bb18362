"""A search and a replay in a whole export, and a network that takes images of another size for a while."""

from __future__ import annotations

import json
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm.export.coreml import convert_encoder
from fastvlm.export.exporter import export
from fastvlm.export.inspect_package import inspect
from fastvlm.export.recipe import PackageInterface, check_calibration, read_recipe
from fastvlm.export.rewrite import rewrite
from fastvlm.export.write_encoder import resized_inputs
from fastvlm.models.errors import UsageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.mlprogram import Constants, read_package
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.calibration import folder_images, trial_images
from fastvlm.quant.encoder import convolutions, quantize, stored_by_plan
from fastvlm.quant.metrics import compare
from fastvlm.quant.schemes import MIN_WEIGHT_SNR_DB, is_candidate

pytestmark = pytest.mark.slow


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


def test_recipe_that_names_other_convolutions_or_options_beside_it_are_refused(mixed: Path, tmp_path: Path) -> None:
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
def test_decoder_options_beside_a_recipe_that_has_a_decoder_are_refused(
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


def test_images_of_ones_own_beside_a_recipe_of_embedded_ones_are_meant(mixed: Path, tmp_path: Path) -> None:
    check_calibration(read_recipe(mixed), folder_images(pictures(tmp_path / "own", 1), 256, "pad"), 256)


def test_decoder_options_settle_what_a_recipe_of_the_encoder_alone_leaves_open(mixed: Path, tmp_path: Path) -> None:
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


def test_int4_is_refused_before_any_work_unless_lint_errors_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"int4.* breaks a rule of the Neural Engine.*allow_lint=True"):
        export("random:tiny", out=tmp_path / "model", quant="int4", on_stage=pytest.fail)


def test_broken_rules_that_were_allowed_are_told_in_the_manifest(tmp_path: Path) -> None:
    results = [export("random:tiny", tmp_path / name, quant="int4", allow_lint=True) for name in ("model", "again")]
    notes = json.loads((tmp_path / "model" / "fastvlm.json").read_text())["notes"]
    told = [note for note in notes if "breaks a rule of the Neural Engine, which was allowed: " in note]
    errors = inspect(tmp_path / "model").errors
    assert errors
    assert all(f"{error.rule}: {error.example}" in note for error, note in zip(errors, told, strict=True))
    assert list(results[0].notes) == notes  # which the command prints
    assert contents(tmp_path / "model") == contents(tmp_path / "again")


def test_network_that_takes_another_size_computes_what_one_written_for_it_does() -> None:
    written = {size: rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), size) for size in (128, 256)}
    small, large = (torch.from_numpy(trial_images(size)[0]) for size in (128, 256))
    expected = written[256](large)
    with resized_inputs(written[256], 256, 128):
        found = written[256](small)
    assert compare(written[128](small).numpy(), found.numpy(), "features").snr_db > 120
    np.testing.assert_array_equal(written[256](large), expected)
