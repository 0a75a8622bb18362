"""Packages of the small reference encoders, run by the executor and compared with the reference's numbers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.export.coreml import convert_encoder
from fastvlm.export.rewrite import rewrite
from fastvlm.models.errors import PackageError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.folder_layout import INPUT_NAME, OUTPUT_NAME
from fastvlm.models.mlprogram import census, read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.quant.calibration import calibration_images
from fastvlm.quant.encoder import quantize, stored_uniformly
from fastvlm.quant.metrics import compare

pytestmark = pytest.mark.slow

CHECKPOINTS = ("llava_small_reparam_tied", "llava_small_train_untied")


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


def test_interface_is_what_the_clients_expect(tmp_path: Path) -> None:
    program = read_package(write_package(RandomCheckpoint("tiny"), "int8", tmp_path / "fastvithd.mlpackage"))
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


def test_correcting_biases_removes_most_of_the_noise(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint("tiny")
    from fastvlm.export.encoder_reference import reference_features
    from fastvlm.quant.calibration import verification_images

    images = verification_images(256)
    expected = reference_features(FastViT.from_checkpoint(checkpoint), images)
    snr = {}
    for correct in (False, True):
        executor = Executor(write_package(checkpoint, "int8", tmp_path / f"{correct}.mlpackage", correct=correct))
        outputs = [executor.run({INPUT_NAME: image})[OUTPUT_NAME] for image in images]
        snr[correct] = compare(np.concatenate(expected), np.concatenate(outputs), "features").snr_db
    assert snr[True] > snr[False] + 3


def test_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for k in range(2):
        package = write_package(RandomCheckpoint("tiny"), "int8", tmp_path / str(k) / "fastvithd.mlpackage")
        contents.append({p.relative_to(package): p.read_bytes() for p in package.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3


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
