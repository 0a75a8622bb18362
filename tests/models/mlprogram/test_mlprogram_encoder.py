"""A whole encoder, the real way: traced by torch, converted by coremltools, run from its saved package."""

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

from fastvlm.models.mlprogram import Program, census, max_rank, read_package
from fastvlm.models.mlprogram.executor import Executor

SIZE = 32


class Attention(nn.Module):
    """Channel-first attention with a channel norm, as the exporter writes it."""

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
    """Every kind of operation of FastViTHD's export, in its order, at 1/1000 of the size."""

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
def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(encoder: Encoder, image: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return encoder(torch.from_numpy(image)).numpy()


@pytest.fixture(scope="module")
def packages(ct: ModuleType, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """float32, float16 (with float32 and with float16 at the borders), int8."""
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


def features(program: Program | Path, image: np.ndarray, precision: Any = "float32") -> np.ndarray:
    return Executor(program, precision).run({"images": image})["image_features"]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape == (1, (SIZE // 4) ** 2, 128)
    assert np.isfinite(found).all() and np.isfinite(expected).all()
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def test_program_has_the_operations_of_an_export(packages: dict[str, Path]) -> None:
    program = read_package(packages["half"])
    assert set(census(program)) == {
        *("add", "cast", "conv", "gelu", "layer_norm", "matmul", "mul"),
        *("reduce_mean", "relu", "reshape", "sigmoid", "softmax", "split", "transpose"),
    }
    assert max_rank(program) == 4


def test_float32_program_equals_torch(
    packages: dict[str, Path], image: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    assert relative(features(packages["float32"], image), expected) <= tolerance("op_float32")


def test_float16_weights_stay_near_torch(
    packages: dict[str, Path], image: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    error = relative(features(packages["half"], image), expected)
    assert 0 < error <= tolerance("encoder_float16_weights")


def test_float16_results_stay_near_torch(
    packages: dict[str, Path], image: np.ndarray, expected: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    found = features(packages["half"], image, "float16")
    np.testing.assert_array_equal(found, found.astype(np.float16))
    assert relative(features(packages["half"], image), expected) < relative(found, expected)
    assert relative(found, expected) <= tolerance("encoder_float16_results")


def test_float16_borders_give_float16(packages: dict[str, Path], image: np.ndarray) -> None:
    half = image.astype(np.float16)
    found = features(packages["half_borders"], half, "float16")
    assert found.dtype == np.float16
    inside = features(packages["half"], half.astype(np.float32), "float16")
    np.testing.assert_array_equal(found.astype(np.float32), inside)


def test_int8_program_equals_torch_with_the_same_rounded_weights(
    packages: dict[str, Path], encoder: Encoder, image: np.ndarray, tolerance: Callable[[str], float]
) -> None:
    """The weights are rounded here by the formula (symmetric, per channel), in float16 as coremltools does."""
    rounded = copy.deepcopy(encoder)
    with torch.inference_mode():
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d):
                half = module.weight.numpy().astype(np.float16)
                top = np.abs(half).max((1, 2, 3), keepdims=True)
                scale = (top + top) / np.float16(254)
                levels = np.clip(np.round(half / scale), -127, 127)
                module.weight.copy_(torch.from_numpy((levels * scale).astype(np.float32)))
        wanted = rounded(torch.from_numpy(image)).numpy()
        original = encoder(torch.from_numpy(image)).numpy()
    found = features(packages["int8"], image)
    assert relative(found, wanted) <= tolerance("encoder_float16_weights") < relative(found, original)
