"""Vision back ends: which one opens where, and what is checked on the way in and out."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import MachineError, PackageError, UsageError
from fastvlm.models.images import to_pixel_values
from fastvlm.models.language import load_language
from fastvlm.runtime import encoders
from fastvlm.runtime.compiled_cache import CompiledCache
from fastvlm.runtime.encoders import (
    COMPUTE_UNITS,
    CoreMLEncoder,
    CoreMLTools,
    ReferenceEncoder,
    Shapes,
    check_pixels,
    checked_features,
    open_encoder,
)
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.folder import open_folder
from fastvlm.runtime.tokenizer import Tokenizer

SIZE, CHANNELS = 128, 3
SHAPES = Shapes(SIZE, CHANNELS, hidden_size=6)
PIXELS = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
FEATURES = np.arange(12, dtype=np.float32).reshape(1, 4, CHANNELS)


class FakeCoreML:
    """Core ML's part of the work: 'compiles' any package into a program that gives patch means."""

    version = "macOS 15.1"
    given: Any

    def compile(self, package: Path, destination: Path) -> None:
        destination.mkdir()

    def open(self, compiled: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def predict(inputs: dict[str, Any]) -> dict[str, Any]:
            self.given = inputs["images"]
            return {"image_features": patch_means(pixels_of(self.given)).astype(np.float16)}

        return predict


def pixels_of(given: Any) -> np.ndarray:
    """0..1 of what Core ML is given: an array, or a PIL image."""
    return given if isinstance(given, np.ndarray) else np.asarray(given).transpose(2, 0, 1)[None] / 255


def patch_means(pixel_values: np.ndarray) -> np.ndarray:
    side = pixel_values.shape[2] // 64
    return pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T[None]  # (1, side * side, 3)


def save_program(path: Path, as_image: bool = False, output: str = "image_features") -> Path:
    """A true ML Program: mean colour per patch; with `as_image` of an RGB image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
    logging.getLogger("coremltools").setLevel(logging.ERROR)

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, SIZE, SIZE))], opset_version=ct.target.iOS17)
    def program(images: Any) -> Any:
        pixels = mb.mul(x=images, y=np.float32(1 / 255)) if as_image else images
        means = mb.avg_pool(x=pixels, kernel_sizes=[64, 64], strides=[64, 64], pad_type="valid")  # (1, 3, 2, 2)
        rows = mb.reshape(x=means, shape=[1, 3, 4])
        if output == "image_embeds":
            rows = mb.concat(values=[rows, mb.reshape(x=means, shape=[1, 3, 4])], axis=1)
        return mb.transpose(x=rows, perm=[0, 2, 1], name=output)  # (1, 4, 3 or 6)

    ct.convert(
        program,
        inputs=[ct.ImageType("images", shape=(1, 3, SIZE, SIZE), color_layout="RGB")] if as_image else None,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return path


@pytest.fixture(scope="module")
def real_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(tmp_path_factory.mktemp("real") / "fastvithd.mlpackage")


@pytest.fixture(scope="module")
def image_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(tmp_path_factory.mktemp("image") / "fastvithd.mlpackage", as_image=True)


def coreml(package: Path, tmp_path: Path, tools: FakeCoreML | None = None) -> CoreMLEncoder:
    return CoreMLEncoder(package, SHAPES, tools or FakeCoreML(), CompiledCache(tmp_path / "cache"))


def test_reference_encoder_runs_the_saved_package(real_package: Path) -> None:
    encoder = open_encoder(real_package, "reference", SHAPES)
    features = encoder.encode(PIXELS)
    assert (encoder.name, encoder.image_size, encoder.compile_ms) == ("reference", SIZE, 0.0)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, patch_means(PIXELS), rtol=0, atol=1e-6)


def test_reference_encoder_refuses_a_package_of_another_size(real_package: Path) -> None:
    with pytest.raises(PackageError):
        ReferenceEncoder(real_package, Shapes(192, CHANNELS, 6)).encode(np.zeros((1, 3, 192, 192), np.float32))


def test_package_error_when_the_reference_executor_finds_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        open_encoder(tmp_path / "none.mlpackage", "reference", SHAPES)


def test_core_ml_encoder_gives_float32_features(real_package: Path, tmp_path: Path) -> None:
    features = coreml(real_package, tmp_path).encode(PIXELS)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, patch_means(PIXELS).astype(np.float16).astype(np.float32))


def test_compile_time_counts_only_when_the_package_was_compiled(real_package: Path, tmp_path: Path) -> None:
    assert coreml(real_package, tmp_path).compile_ms > 0
    assert coreml(real_package, tmp_path).compile_ms == 0


def test_package_that_takes_an_image_gets_one(image_package: Path, tmp_path: Path) -> None:
    square = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
    pixel_values = to_pixel_values(square)
    expected = patch_means(pixel_values)
    features = ReferenceEncoder(image_package, SHAPES).encode(pixel_values)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)
    tools = FakeCoreML()
    features = coreml(image_package, tmp_path, tools).encode(pixel_values)
    assert (tools.given.mode, tools.given.size) == ("RGB", (SIZE, SIZE))
    np.testing.assert_array_equal(np.asarray(tools.given), square.transpose(1, 2, 0))  # every byte as it was
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-3)


def test_package_with_the_projector_says_so(real_package: Path, tmp_path: Path) -> None:
    projecting = save_program(tmp_path / "fastvithd.mlpackage", output="image_embeds")
    encoder = ReferenceEncoder(projecting, SHAPES)
    assert encoder.projected
    assert coreml(projecting, tmp_path).projected
    assert encoder.encode(PIXELS).shape == (1, 4, 6)
    assert not ReferenceEncoder(real_package, SHAPES).projected


@pytest.mark.parametrize(
    ("pixel_values", "found"),
    [
        (PIXELS[0], r"float32 of shape \(3, 128, 128\)"),
        (PIXELS.astype(np.float64), "found float64"),
        (np.zeros((1, 3, 64, 64), np.float32), r"\(1, 3, 64, 64\)"),
        (np.zeros((2, 3, SIZE, SIZE), np.float32), r"\(2, 3, 128, 128\)"),
    ],
)
def test_package_error_when_pixels_have_another_form(pixel_values: np.ndarray, found: str) -> None:
    with pytest.raises(PackageError, match=found):
        check_pixels(pixel_values, SHAPES)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"other": FEATURES}, r"output 'image_features'; found \['other'\]"),
        ({"image_features": FEATURES[0]}, r"shape \(1, 4, 3\).*found \(4, 3\)"),
        ({"image_features": FEATURES.reshape(1, 3, 4)}, r"found \(1, 3, 4\)"),
        ({"image_embeds": FEATURES}, r"image_embeds should have shape \(1, 4, 6\)"),
        ({"image_features": np.where(FEATURES == 5, np.nan, FEATURES)}, "1 of 12 values .* not finite"),
        ({"image_features": np.where(FEATURES > 9, np.inf, FEATURES)}, "2 of 12 values .* not finite"),
    ],
)
def test_package_error_when_features_are_wrong(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        checked_features(outputs, SHAPES)


def test_package_is_fed_by_name(real_package: Path, tmp_path: Path) -> None:
    tools = FakeCoreML()
    coreml(real_package, tmp_path, tools).encode(PIXELS)
    assert tools.given is PIXELS


@pytest.mark.parametrize(
    ("platform", "expected"), [("darwin", "coreml"), ("linux", "reference"), ("win32", "reference")]
)
def test_back_end_follows_the_machine_when_none_is_named(
    platform: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(encoders, "CoreMLTools", lambda units: FakeCoreML())
    monkeypatch.setattr(encoders, "CoreMLEncoder", lambda *args: ("coreml", *args))
    monkeypatch.setattr(encoders, "ReferenceEncoder", lambda *args: ("reference", *args))
    opened = open_encoder(Path("p"), None, SHAPES)
    assert opened[:3] == (expected, Path("p"), SHAPES)  # type: ignore[index]
    assert open_encoder(Path("p"), "reference", SHAPES)[0] == "reference"  # type: ignore[index]
    assert open_encoder(Path("p"), "coreml", SHAPES)[0] == "coreml"  # type: ignore[index]


def test_usage_error_when_no_such_back_end_exists() -> None:
    with pytest.raises(UsageError, match="'reference' or 'mlx'; found 'cuda'"):
        open_encoder(Path("p"), "cuda", SHAPES)


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML works")
def test_machine_error_when_core_ml_is_asked_for_off_a_mac(real_package: Path) -> None:
    with pytest.raises(MachineError, match="macOS only"):
        open_encoder(real_package, "coreml", SHAPES)


class FakeModel:
    """What coremltools' CompiledMLModel is to us."""

    opened: tuple[str, object]

    def __init__(self, path: str, compute_units: object) -> None:
        type(self).opened = (path, compute_units)

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "images" not in inputs:
            raise RuntimeError('{\n    NSLocalizedDescription = "Failed to run: error code: -14.";\n}')
        return {"image_features": FEATURES}


def test_answer_is_the_same_when_the_encoder_works_beside_the_decoder(
    real_package: Path, write_folder: Callable[..., Path]
) -> None:
    folder = open_folder(write_folder(mm_hidden_size=CHANNELS, mm_vision_tower=f"mobileclip_l_{SIZE}"))
    image = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    answers = []
    for beside in (False, True):
        encoder = open_encoder(real_package, "reference", Shapes.of(folder.config))
        language = load_language(folder.weights(), folder.config)
        vlm = FastVLM(folder, encoder, language, Tokenizer(folder.path), load_ms=0.0)
        assert vlm._starter.beside is False  # the reference executor has no hardware of its own
        vlm._starter.beside = beside
        answers.append(vlm.generate(image, "Hi", temperature=1.0, seed=3, max_tokens=8, system="S"))
    assert answers[0].token_ids == answers[1].token_ids
    assert len(set(answers[0].token_ids)) > 3


@pytest.mark.parametrize("units", COMPUTE_UNITS)
def test_core_ml_is_asked_for_the_compute_units(units: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "CompiledMLModel", FakeModel)
    CoreMLTools(units).open(tmp_path / "a.mlmodelc")
    assert FakeModel.opened[1] is coremltools.ComputeUnit[units]


def test_compute_units_reach_core_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CoreMLTools", lambda units: units)
    monkeypatch.setattr(encoders, "CoreMLEncoder", lambda package, shapes, tools: tools)
    assert open_encoder(Path("p"), "coreml", SHAPES) == "CPU_AND_NE"
    assert open_encoder(Path("p"), "coreml", SHAPES, "CPU_ONLY") == "CPU_ONLY"
    with pytest.raises(UsageError, match="one of CPU_AND_NE, .*; found 'GPU'"):
        open_encoder(Path("p"), "coreml", SHAPES, "GPU")
    with pytest.raises(UsageError, match="compute_units are Core ML's, and vision is 'reference'"):
        open_encoder(Path("p"), "reference", SHAPES, "ALL")


def test_core_ml_is_asked_for_the_neural_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    import coremltools.models.utils as utils

    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(utils, "compile_model", lambda source, destination: compiled.append((source, destination)))
    monkeypatch.setattr(coremltools.models, "CompiledMLModel", FakeModel)
    tools = CoreMLTools()
    assert tools.version.startswith("macOS")
    tools.compile(tmp_path / "a.mlpackage", tmp_path / "a.mlmodelc")
    assert compiled == [(str(tmp_path / "a.mlpackage"), str(tmp_path / "a.mlmodelc"))]
    predict = tools.open(tmp_path / "a.mlmodelc")
    assert FakeModel.opened == (str(tmp_path / "a.mlmodelc"), coremltools.ComputeUnit.CPU_AND_NE)
    assert checked_features(predict({"images": PIXELS}), SHAPES) is FEATURES
    with pytest.raises(PackageError, match=r"Core ML cannot run the package: Failed to run: error code: -14\.$"):
        predict({})
