"""From a checkpoint to its package: what calibration decides on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm.export.coreml import convert_encoder
from fastvlm.export.exporter import export
from fastvlm.export.inspect_package import inspect
from fastvlm.export.rewrite import branch_convolutions, rewrite, stream_maxima, stream_scales
from fastvlm.models.errors import PackageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.activations import int8_scales
from fastvlm.quant.calibration import calibration_images
from fastvlm.quant.encoder import quantize, stored_uniformly
from fastvlm.quant.metrics import compare

pytestmark = pytest.mark.slow


def overflow_stage_2(tensors: dict[str, torch.Tensor]) -> None:
    """Stage 2's residual stream passes 65,504, and what reads it brings it back, as in trained weights."""
    readers = ("network.4.1.convffn.conv.conv.weight", "proj.0.lkb_origin.conv.weight", "small_conv.conv.weight")
    for name in tensors:
        if name.endswith(("network.4.0.layer_scale", "network.4.1.layer_scale")):
            tensors[name] *= 400_000
        if ("network.4." in name or "network.5." in name) and name.endswith(readers):
            tensors[name] /= 400_000


def test_rescaling_makes_an_overflowing_stream_finite_and_changes_nothing_else(
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


def test_values_near_the_end_of_float16_are_told(write_checkpoint: Callable, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        """What one feed-forward computes inside passes a quarter of float16's range: no rescaling can help there."""
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


def write_w8a8(checkpoint: object, package: Path) -> tuple[Path, dict[str, np.float16]]:
    calibration = calibration_images(256)
    with torch.no_grad():
        network = rewrite(FastViT.from_checkpoint(checkpoint), 256)
    stored = stored_uniformly(network, "int8")
    quantize(network, stored, calibration)
    scales = int8_scales(network, branch_convolutions(network), calibration)
    convert_encoder(network, 256, stored, package, metadata={}, on_stage=lambda _: None, int8_inputs=scales)
    return package, scales


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
            int8_inputs={"gone": np.float16(0.1)},
        )


def test_inputs_that_float16_scales_cannot_reach_stay_float16() -> None:
    with torch.no_grad():
        network = rewrite(FastViT.from_checkpoint(RandomCheckpoint("tiny")), 128)
    names = branch_convolutions(network)
    images = calibration_images(128)
    scales = int8_scales(network, names, images)
    assert list(scales) == names
    network.get_submodule(names[0].replace("fc1", "conv")).weight.data *= 1e-6
    network.get_submodule(names[0].replace("fc1", "conv")).bias.data *= 1e-6
    assert names[0] not in int8_scales(network, names, images)


def test_w8a8_is_exported_calibrated_on_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    for index, pixels in enumerate(calibration_images(160).pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    result = export("random:tiny", tmp_path / "model", quant="w8a8", image_size=128, calibrate=folder)
    manifest = json.loads((result.folder / "fastvlm.json").read_text())
    assert manifest["recipe"]["quant"] == "w8a8"
    assert manifest["recipe"]["calibration"]["source"] == "folder"
    assert manifest["recipe"]["calibration"]["images"] == 2
    assert len(manifest["recipe"]["int8_inputs"]) == 18
    assert any("images skipped: broken.jpg" in note for note in manifest["notes"])
    assert str(tmp_path) not in json.dumps(manifest)
