"""The executor: runs, precision, ranges, refused inputs, and a small encoder converted from torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm.models.errors import PackageError, UsageError
from fastvlm.models.mlprogram import Program, census, max_rank, read_package
from fastvlm.models.mlprogram.binding import Kind
from fastvlm.models.mlprogram.executor import Executor, Precision, _check_input, max_abs
from fastvlm.models.mlprogram.ops import KINDS

pytestmark = pytest.mark.slow

SHAPE = (1, 8, 6, 6)


@pytest.fixture
def image() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)}


def only(result: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = result.values()
    return array


def test_runs_repeat_exactly_and_do_not_change_the_input(small_package: Path, image: dict[str, np.ndarray]) -> None:
    executor = Executor(small_package)
    kept = image["x"].copy()
    image["x"].flags.writeable = False
    first, second = executor.run(image), executor.run(image)
    np.testing.assert_array_equal(only(first), only(second))
    np.testing.assert_array_equal(image["x"], kept)
    assert only(first).flags.owndata and only(first).flags.c_contiguous and only(first).dtype == np.float32


def test_outputs_can_be_any_results(small_package: Path, image: dict[str, np.ndarray]) -> None:
    program = read_package(small_package)
    (name,) = [o.outputs[0].name for o in program.operations if o.kind == "gelu"]
    found = Executor(program, outputs=[name]).run(image)
    assert list(found) == [name]
    assert found[name].dtype == np.float16 and found[name].shape == (1, 16, 6, 6)
    with pytest.raises(UsageError, match="nowhere"):
        Executor(program, outputs=["nowhere"])


def test_float16_rounds_each_result_as_numpy_does(save_program: Callable[..., Path]) -> None:
    build = lambda mb, x: mb.exp(x=x, name="out")  # noqa: E731
    path = save_program(build, {"x": (4, 50)}, half=True)
    x = np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32) * 3
    found = only(Executor(path, precision="float16").run({"x": x}))
    rounded = x.astype(np.float16).astype(np.float32)
    expected = np.exp(rounded).astype(np.float16).astype(np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, only(Executor(path).run({"x": x})))


def test_float16_does_not_round_float32_results(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.exp(x=x), {"x": (4, 50)}, half=False)
    x = {"x": np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32)}
    np.testing.assert_array_equal(only(Executor(path, "float16").run(x)), only(Executor(path).run(x)))


def test_float16_cast_does_not_change_its_source(save_program: Callable[..., Path]) -> None:
    def build(mb: Any, x: Any) -> Any:
        exact = mb.exp(x=x)
        rounded = mb.cast(x=mb.cast(x=exact, dtype="fp16"), dtype="fp32")
        return [rounded, mb.identity(x=exact, name="exact")]

    x = np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32)
    found = Executor(save_program(build, {"x": (4, 50)}), "float16").run({"x": x})
    exact = found.pop("exact")
    np.testing.assert_allclose(exact, np.exp(x), rtol=1e-6)
    np.testing.assert_array_equal(only(found), exact.astype(np.float16).astype(np.float32))
    assert not np.array_equal(only(found), exact)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_cast_to_float16_and_back_rounds_in_every_mode(save_program: Callable[..., Path], precision: Precision) -> None:
    path = save_program(lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), {"x": (3,)})
    found = only(Executor(path, precision).run({"x": np.array([1e5, 1, 1 / 3], np.float32)}))
    np.testing.assert_array_equal(found, np.array([np.inf, 1, 0.33325195], np.float32))


def test_cast_before_arithmetic_in_float16_is_exact_in_float32(save_program: Callable[..., Path]) -> None:
    def build(mb: Any, x: Any) -> Any:
        half = mb.cast(x=x, dtype="fp16")
        return [mb.cast(x=half, dtype="fp32", name="same"), mb.cast(x=mb.exp(x=half), dtype="fp32", name="grown")]

    x = np.random.default_rng(4).normal(size=50).astype(np.float32)
    found = Executor(save_program(build, {"x": (50,)})).run({"x": x})
    np.testing.assert_array_equal(found["same"], x)
    np.testing.assert_allclose(found["grown"], np.exp(x), rtol=1e-6)


def test_float16_sum_of_two_rounded_terms_is_rounded_once(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x, y: mb.add(x=x, y=y), {"x": (1000,), "y": (1000,)}, half=True)
    rng = np.random.default_rng(8)
    x, y = (rng.normal(size=1000).astype(np.float16) for _ in range(2))
    found = only(Executor(path, "float16").run({"x": x, "y": y}))
    np.testing.assert_array_equal(found.astype(np.float16), x + y)


def overflowing(mb: Any, x: Any) -> Any:
    large = mb.mul(x=x, y=np.float32(300.0), name="large")
    larger = mb.mul(x=large, y=np.float32(300.0), name="larger")
    return mb.mul(x=larger, y=np.float32(1e-3), name="out")


def test_first_overflow_is_named_with_its_true_size(save_program: Callable[..., Path]) -> None:
    executor = Executor(save_program(overflowing, {"x": (2, 3)}, half=True), "float16", record_ranges=True)
    assert np.isinf(only(executor.run({"x": np.ones((2, 3), np.float32)}))).all()
    assert executor.first_overflow is not None and executor.first_overflow.startswith("larger")
    assert executor.ranges[executor.first_overflow] == 90_000
    executor.run({"x": np.full((2, 3), 0.1, np.float32)})
    assert executor.first_overflow is None


def test_overflow_is_found_without_ranges_only_in_float16(save_program: Callable[..., Path]) -> None:
    path = save_program(overflowing, {"x": (2, 3)}, half=True)
    ones = {"x": np.ones((2, 3), np.float32)}
    executor = Executor(path, "float16")
    executor.run(ones)
    assert executor.first_overflow is not None and executor.ranges == {}
    plain = Executor(path)
    np.testing.assert_allclose(only(plain.run(ones)), 90, rtol=1e-3)
    assert plain.first_overflow is None


def test_largest_float16_is_not_an_overflow(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.mul(x=x, y=np.float32(2.0)), {"x": (2,)}, half=True)
    executor = Executor(path, "float16")
    assert only(executor.run({"x": np.array([32752, -32752], np.float32)})).tolist() == [65504, -65504]
    assert executor.first_overflow is None


def test_ranges_are_maxima_over_all_runs(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.exp(x=mb.sub(x=x, y=1.0, name="shifted"), name="out"), {"x": (1, 2, 2, 2)})
    executor = Executor(path, record_ranges=True)
    for top in (2.0, -5.0, 1.0):
        executor.run({"x": np.full((1, 2, 2, 2), top, np.float32)})
    assert executor.ranges == {"x": 5.0, "shifted": 6.0, "out": pytest.approx(np.e)}


def test_max_abs_covers_every_element_in_any_layout() -> None:
    base = torch.zeros(1, 3, 4, 5)
    base[0, 1, 2, 3] = -7
    for tensor in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.permute(0, 2, 3, 1),
        base[:, 1:, ::2],
    ):
        assert max_abs(tensor) == 7
    base[0, 0, 0, 0] = float("nan")
    assert np.isnan(max_abs(base))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"the inputs must be \['x'\], got \[\]"),
        ({"x": np.zeros(SHAPE), "y": np.zeros(1)}, r"got \['x', 'y'\]"),
        ({"x": np.zeros((1, 8, 6, 7))}, r"shape must be fp32\[1, 8, 6, 6\], got \[1, 8, 6, 7\]"),
        ({"x": np.zeros(SHAPE[1:])}, "shape must be"),
        ({"x": np.zeros(SHAPE, complex)}, "got complex128"),
        ({"x": np.full(SHAPE, "a")}, "numbers"),
        ({"x": np.full(SHAPE, np.nan)}, "got NaN"),
        ({"x": np.full(SHAPE, 1e39)}, "range of float32, got 1e\\+39"),
    ],
)
def test_bad_input_is_refused_in_one_line(small_package: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PackageError, match=message) as caught:
        Executor(small_package).run(inputs)
    assert "\n" not in str(caught.value)


def test_integer_image_is_converted(small_package: Path) -> None:
    executor = Executor(small_package)
    pixels = np.random.default_rng(0).integers(0, 256, size=SHAPE).astype(np.uint8)
    np.testing.assert_array_equal(
        only(executor.run({"x": pixels})), only(executor.run({"x": pixels.astype(np.float64)}))
    )


def test_integer_input_is_checked(save_program: Callable[..., Path]) -> None:
    build = lambda mb, x: mb.cast(x=x, dtype="fp32")  # noqa: E731
    executor = Executor(save_program(build, {"x": (2,)}, dtype="int32"))
    assert only(executor.run({"x": np.array([3, -4])})).tolist() == [3, -4]
    with pytest.raises(PackageError, match="range of int32, got 1099511627776"):
        executor.run({"x": np.array([1 << 40, 0])})
    with pytest.raises(PackageError, match="convert to int32, got float64"):
        executor.run({"x": np.array([1.5, 0.0])})


def test_input_is_copied(small_package: Path) -> None:
    (declared,) = read_package(small_package).inputs
    x = np.ones(SHAPE, np.float32)
    assert not np.shares_memory(_check_input(declared, x), x)


def test_result_of_another_shape_than_declared_is_refused(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    def change(model: Any) -> None:
        conv = next(o for o in block_of(model).operations if o.type == "conv")
        conv.outputs[0].type.tensorType.dimensions[2].constant.size = 5

    with pytest.raises(PackageError, match=r"must be fp16\[1, 16, 5, 6\], got shape \[1, 16, 6, 6\]"):
        Executor(edit(small_package, change))


def test_failure_inside_torch_names_the_operation(small_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("two lines\nof trouble")

    monkeypatch.setitem(KINDS, "gelu", Kind(("x",), lambda p: fail))
    with pytest.raises(PackageError, match=r"act\S* \(gelu\): two lines$") as caught:
        Executor(small_package).run({"x": np.zeros(SHAPE, np.float32)})
    assert "\n" not in str(caught.value)


def test_unknown_precision_is_refused(small_package: Path) -> None:
    with pytest.raises(UsageError, match="float32, float16, float16-accumulate .got 'bfloat16'"):
        Executor(small_package, precision="bfloat16")


def test_activations_are_channels_last_and_results_are_not(
    small_package: Path, image: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels-last makes convolutions twice as fast. The caller never sees it."""
    seen: list[bool] = []

    def bind(p: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def step(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

        return step

    monkeypatch.setitem(KINDS, "gelu", Kind(("x",), bind))
    assert only(Executor(small_package).run(image)).flags.c_contiguous
    assert seen == [True]


SIZE = 32


class Attention(nn.Module):
    """Channel-first attention with a channel norm, like in an export."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 32
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        z = x - x.mean(1, keepdim=True)
        z = z * ((z * z).mean(1, keepdim=True) + 1e-5).rsqrt()
        y = self.qkv(z).reshape(batch, 3 * self.heads, 32, height * width)
        q, k, v = y.split(self.heads, dim=1)  # (B, heads, 32, N) each
        weights = torch.softmax(q.transpose(-1, -2) @ k, dim=-1)
        y = (v @ weights.transpose(-1, -2)).reshape(batch, channels, height, width)
        return x + self.proj(y)


class Mixer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.up = nn.Conv2d(channels, 2 * channels, 1)
        self.down = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    """An encoder with every kind of operation of FastViTHD's export, in its order, at 1/1000 of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.body = nn.Sequential(Mixer(32), nn.Conv2d(32, 64, 7, 2, 3, groups=32), nn.GELU(), Attention(64), Mixer(64))
        self.expand = nn.Conv2d(64, 128, 3, padding=1, groups=64)
        self.squeeze, self.excite = nn.Conv2d(128, 8, 1), nn.Conv2d(8, 128, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.expand(self.body(F.gelu(self.stem(images))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.gelu(x * gate)
        return x.reshape(1, 128, -1).transpose(1, 2)  # (B, L, C)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def pixel_values() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(encoder: Encoder, pixel_values: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return encoder(torch.from_numpy(pixel_values)).numpy()


@pytest.fixture(scope="module")
def packages(ct: ModuleType, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The encoder's packages: float32, float16 (with float32 and with float16 inputs and outputs), int8."""
    folder = tmp_path_factory.mktemp("encoder")
    with torch.inference_mode():
        traced = torch.jit.trace(encoder, torch.zeros(1, 3, SIZE, SIZE))

    def convert(precision: Any, border: type = np.float32) -> Any:
        return ct.convert(
            traced,
            inputs=[ct.TensorType(name="images", shape=(1, 3, SIZE, SIZE), dtype=border)],
            outputs=[ct.TensorType(name="image_features", dtype=border)],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=precision,
            skip_model_load=True,
        )

    half = convert(ct.precision.FLOAT16)
    optimize = ct.optimize.coreml
    config = optimize.OptimizationConfig(
        global_config=optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=1)
    )
    models = {
        "float32": convert(ct.precision.FLOAT32),
        "half": half,
        "half_borders": convert(ct.precision.FLOAT16, np.float16),
        "int8": optimize.linear_quantize_weights(half, config),
    }
    for name, model in models.items():
        model.save(str(folder / f"{name}.mlpackage"))
    return {name: folder / f"{name}.mlpackage" for name in models}


def features(program: Program | Path, pixel_values: np.ndarray, precision: Any = "float32") -> np.ndarray:
    return Executor(program, precision).run({"images": pixel_values})["image_features"]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape == (1, (SIZE // 4) ** 2, 128)
    assert np.isfinite(found).all() and np.isfinite(expected).all()
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def test_encoder_has_the_operations_of_an_export(packages: dict[str, Path]) -> None:
    program = read_package(packages["half"])
    assert set(census(program)) == {
        *("add", "cast", "conv", "gelu", "layer_norm", "matmul", "mul"),
        *("reduce_mean", "relu", "reshape", "sigmoid", "softmax", "split", "transpose"),
    }
    assert max_rank(program) == 4


def test_float32_encoder_equals_torch(
    packages: dict[str, Path], pixel_values: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    assert relative(features(packages["float32"], pixel_values), expected) <= tolerance("op_float32")


def test_float16_weights_are_close_to_torch(
    packages: dict[str, Path], pixel_values: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    error = relative(features(packages["half"], pixel_values), expected)
    assert 0 < error <= tolerance("encoder_float16_weights")


def test_float16_results_are_close_to_torch(
    packages: dict[str, Path], pixel_values: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    found = features(packages["half"], pixel_values, "float16")
    np.testing.assert_array_equal(found, found.astype(np.float16))
    assert relative(features(packages["half"], pixel_values), expected) < relative(found, expected)
    assert relative(found, expected) <= tolerance("encoder_float16_results")


def test_float16_interface_returns_float16(packages: dict[str, Path], pixel_values: np.ndarray) -> None:
    half = pixel_values.astype(np.float16)
    found = features(packages["half_borders"], half, "float16")
    assert found.dtype == np.float16
    inside = features(packages["half"], half.astype(np.float32), "float16")
    np.testing.assert_array_equal(found.astype(np.float32), inside)


def test_int8_encoder_equals_torch_with_rounded_weights(
    packages: dict[str, Path], encoder: Encoder, pixel_values: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    """The expected weights are rounded by the formula (symmetric, per channel), in float16 like in coremltools."""
    rounded = copy.deepcopy(encoder)
    with torch.inference_mode():
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d):
                half = module.weight.numpy().astype(np.float16)
                top = np.abs(half).max((1, 2, 3), keepdims=True)
                scale = (top + top) / np.float16(254)
                levels = np.clip(np.round(half / scale), -127, 127)
                module.weight.copy_(torch.from_numpy((levels * scale).astype(np.float32)))
        wanted = rounded(torch.from_numpy(pixel_values)).numpy()
        original = encoder(torch.from_numpy(pixel_values)).numpy()
    found = features(packages["int8"], pixel_values)
    assert relative(found, wanted) <= tolerance("encoder_float16_weights") < relative(found, original)
