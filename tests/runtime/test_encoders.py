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
from fastvlm.runtime import encoder_process, encoders
from fastvlm.runtime.compiled_cache import CompiledCache
from fastvlm.runtime.encoders import (
    CoreMLEncoder,
    ReferenceEncoder,
    Shapes,
    check_pixels,
    checked_features,
    open_encoder,
)

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


def test_core_ml_gets_one_pinned_array_for_every_image(real_package: Path, tmp_path: Path) -> None:
    tools = FakeCoreML()
    encoder, seen = coreml(real_package, tmp_path, tools), []
    for pixel_values in (PIXELS, 1 - PIXELS):
        np.testing.assert_allclose(encoder.encode(pixel_values), patch_means(pixel_values), rtol=0, atol=1e-3)
        seen.append(tools.given)
        assert sys.getrefcount(tools.given) > 2**19
    assert seen[0] is seen[1]
    assert seen[0] is not PIXELS


def test_core_ml_is_run_once_when_the_package_is_loaded(real_package: Path, tmp_path: Path) -> None:
    tools, stages = FakeCoreML(), []
    encoder = CoreMLEncoder(real_package, SHAPES, tools, CompiledCache(tmp_path / "cache"), stages.append)
    assert not tools.given.any()
    assert stages == ["open", "warm"]
    assert encoder.compile_ms == encoder.open_ms + encoder.first_predict_ms > 0


def test_features_that_are_not_finite_fail_the_load(real_package: Path, tmp_path: Path) -> None:
    class Overflowing(FakeCoreML):
        def open(self, compiled: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
            return lambda inputs: {"image_features": np.full((1, 4, CHANNELS), np.inf, np.float16)}

    with pytest.raises(PackageError, match="12 of 12 values .* not finite"):
        coreml(real_package, tmp_path, Overflowing())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the encoders that would have been started in a process."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(encoder_process, "EncoderProcess", lambda *args, **options: calls.append(options) or "process")
    monkeypatch.setattr(encoders, "ReferenceEncoder", lambda *args: "in process")
    monkeypatch.delenv("FASTVLM_COMPUTE_UNITS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("platform", "expected"), [("darwin", "process"), ("linux", "in process"), ("win32", "in process")]
)
def test_back_end_follows_the_machine_when_none_is_named(
    platform: str, expected: str, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert open_encoder(Path("p"), None, SHAPES) == expected
    assert open_encoder(Path("p"), "reference", SHAPES) == "in process"
    assert open_encoder(Path("p"), "reference", SHAPES, None, True) == "process"
    assert started[-1]["backend"] == "reference"


def test_compute_units_come_from_argument_then_variable(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    open_encoder(Path("p"), "coreml", SHAPES)
    monkeypatch.setenv("FASTVLM_COMPUTE_UNITS", "CPU_ONLY")
    open_encoder(Path("p"), "coreml", SHAPES)
    open_encoder(Path("p"), "coreml", SHAPES, "ALL")
    assert [options["compute_units"] for options in started] == ["CPU_AND_NE", "CPU_ONLY", "ALL"]
    monkeypatch.setenv("FASTVLM_COMPUTE_UNITS", "ENGINE")
    with pytest.raises(UsageError, match="FASTVLM_COMPUTE_UNITS should be one of .*'ENGINE'"):
        open_encoder(Path("p"), "coreml", SHAPES)
    assert open_encoder(Path("p"), "reference", SHAPES) == "in process"


def test_compute_units_of_no_use_are_refused() -> None:
    with pytest.raises(UsageError, match="one of CPU_AND_NE, .*; found 'GPU'"):
        open_encoder(Path("p"), "coreml", SHAPES, "GPU")
    with pytest.raises(UsageError, match="compute_units are Core ML's, and vision is 'reference'"):
        open_encoder(Path("p"), "reference", SHAPES, "ALL")


def test_usage_error_when_no_such_back_end_exists() -> None:
    with pytest.raises(UsageError, match="'reference' or 'mlx'; found 'cuda'"):
        open_encoder(Path("p"), "cuda", SHAPES)


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML works")
def test_machine_error_when_core_ml_is_asked_for_off_a_mac(real_package: Path) -> None:
    with pytest.raises(MachineError, match="macOS only"):
        open_encoder(real_package, "coreml", SHAPES)
