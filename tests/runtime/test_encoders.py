"""Vision encoders: their features, and the checks of their inputs and outputs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import PackageError
from fastvlm.models.images import to_pixel_values
from fastvlm.runtime.compiled_cache import CompiledCache
from fastvlm.runtime.encoders import CoreMLEncoder, ReferenceEncoder, Shapes, check_pixels, checked_features

SIZE, CHANNELS = 128, 3
SHAPES = Shapes(SIZE, CHANNELS, hidden_size=6)
PIXELS = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
FEATURES = np.arange(12, dtype=np.float32).reshape(1, 4, CHANNELS)


class FakeCoreML:
    """A compiler in place of Core ML, whose packages give patch means."""

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
    """Returns the pixels in 0..1 of an input of Core ML, an array or a PIL image."""
    return given if isinstance(given, np.ndarray) else np.asarray(given).transpose(2, 0, 1)[None] / 255


def patch_means(pixel_values: np.ndarray) -> np.ndarray:
    side = pixel_values.shape[2] // 64
    return pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T[None]  # (1, side * side, 3)


def save_program(path: Path, as_image: bool = False, output: str = "image_features") -> Path:
    """Saves an ML Program that gives the mean colour of each patch, with `as_image` from an RGB image."""
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
    encoder = ReferenceEncoder(real_package, SHAPES)
    features = encoder.encode(PIXELS)
    assert (encoder.name, encoder.image_size, encoder.compile_ms) == ("reference", SIZE, 0.0)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, patch_means(PIXELS), rtol=0, atol=1e-6)


def test_reference_encoder_refuses_a_package_of_another_size(real_package: Path) -> None:
    with pytest.raises(PackageError):
        ReferenceEncoder(real_package, Shapes(192, CHANNELS, 6)).encode(np.zeros((1, 3, 192, 192), np.float32))


def test_package_error_when_there_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        ReferenceEncoder(tmp_path / "none.mlpackage", SHAPES)


def test_core_ml_encoder_gives_float32_features(real_package: Path, tmp_path: Path) -> None:
    features = coreml(real_package, tmp_path).encode(PIXELS)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, patch_means(PIXELS).astype(np.float16).astype(np.float32))


def test_compile_time_is_0_when_the_package_was_compiled_before(real_package: Path, tmp_path: Path) -> None:
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


def test_package_with_the_projector_is_projected(real_package: Path, tmp_path: Path) -> None:
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
        (PIXELS.astype(np.float64), "got float64"),
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
        ({"other": FEATURES}, r"output 'image_features' \(got \['other'\]\)"),
        ({"image_features": FEATURES[0]}, r"shape \(1, 4, 3\).*got \(4, 3\)"),
        ({"image_features": FEATURES.reshape(1, 3, 4)}, r"got \(1, 3, 4\)"),
        ({"image_embeds": FEATURES}, r"image_embeds must have the shape \(1, 4, 6\)"),
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
