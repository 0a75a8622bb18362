"""FastViT in MLX, compared with the numbers of the reference implementation and with the torch form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastvlm.models._mlx import mx
from fastvlm.models.errors import WeightsError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.fastvit_mlx import FastViTMLX, convolve, depthwise, doubled_depthwise
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.tensor_names import APPLE_ENCODER_PREFIX, MLX_ENCODER_PREFIX, renamed, to_mlx_axes


def mlx_tensors(apple: dict[str, np.ndarray]) -> dict[str, mx.array]:
    """Returns mlx-vlm's tensors for Apple's, whose names lack the tower's prefix."""
    return {
        renamed(APPLE_ENCODER_PREFIX + name, "apple", "mlx").removeprefix(MLX_ENCODER_PREFIX): mx.array(
            values.transpose(to_mlx_axes(values.shape))
        )
        for name, values in apple.items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny")).reparameterize()


@pytest.fixture(scope="module")
def tensors(encoder: FastViT) -> dict[str, mx.array]:
    return mlx_tensors({name: tensor.numpy() for name, tensor in encoder.state_dict().items()})


@pytest.mark.parametrize("size", [256, 320])
def test_features_match_the_reference(golden: Path, tolerance: Callable[[str], float], size: int) -> None:
    network = FastViTMLX.from_tensors(mlx_tensors(load_file(golden / "fastvit_small_reparam.safetensors")))
    with np.load(golden / "fastvit_small_io.npz") as stored:
        images, expected = stored[f"images_{size}"], stored[f"image_features_{size}"]
    found = np.array(network(mx.array(images)))
    assert np.isfinite(found).all()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance("encoder_mlx_float32") * np.abs(expected).max()


def test_every_stage_matches_torch(
    encoder: FastViT, tensors: dict[str, mx.array], tolerance: Callable[[str], float]
) -> None:
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = [encoder.patch_embed(images)]
    with torch.inference_mode():
        x = expected[0]
        for part in encoder.network:
            x = part(x)
            if isinstance(part, torch.nn.Sequential):
                expected.append(x)
        features = encoder.features(x).numpy()
    found = {name: np.array(result) for name, result in FastViTMLX.from_tensors(tensors).results(mx.array(images))}
    assert list(found) == ["stem", *(f"stage {i}" for i in range(5)), "image_features"]
    stages = [*(tensor.numpy().transpose(0, 2, 3, 1) for tensor in expected), features]
    for (name, result), stage in zip(found.items(), stages, strict=True):
        assert np.abs(result - stage).max() < tolerance("encoder_mlx_float32") * np.abs(stage).max(), name


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (9, 7, 1), (8, 7, 2), (10, 3, 2)])
def test_depthwise_taps_are_the_convolution(size: int, kernel: int, stride: int) -> None:
    mx.random.seed(0)
    x, weight = mx.random.normal((2, size, size, 6)), mx.random.normal((6, kernel, kernel, 1))
    expected = mx.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=6)
    assert mx.abs(depthwise(x, weight, stride) - expected).max().item() < 1e-5
    assert mx.abs(convolve(x, weight, stride, 6) - expected).max().item() < 1e-5


@pytest.mark.parametrize(("size", "kernel", "stride"), [(9, 7, 2), (8, 3, 1)])
def test_doubled_depthwise_is_the_convolution(size: int, kernel: int, stride: int, computing_on: Callable) -> None:
    mx.random.seed(0)
    x, weight = mx.random.normal((2, size, size, 6)), mx.random.normal((12, kernel, kernel, 1))
    expected = mx.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=6)
    assert mx.abs(doubled_depthwise(x, weight, stride) - expected).max().item() < 1e-5
    computing_on("gpu")
    assert mx.array_equal(convolve(x, weight, stride, 6), doubled_depthwise(x, weight, stride)).item()


def test_features_on_a_gpu_are_those_of_the_cpu(
    tensors: dict[str, mx.array], tolerance: Callable[[str], float], computing_on: Callable
) -> None:
    images = mx.random.uniform(shape=(1, 3, 128, 128), key=mx.random.key(0))
    expected = np.array(FastViTMLX.from_tensors(tensors)(images))
    computing_on("gpu")
    found = np.array(FastViTMLX.from_tensors(tensors)(images))
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < tolerance("encoder_mlx_float32") * np.abs(expected).max()


def test_bfloat16_weights_stay_on_a_gpu(
    tensors: dict[str, mx.array], tolerance: Callable[[str], float], computing_on: Callable
) -> None:
    stored = {name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()}
    images = mx.random.uniform(shape=(1, 3, 128, 128), key=mx.random.key(0))
    expected = np.array(FastViTMLX.from_tensors(stored)(images))
    computing_on("gpu")
    network = FastViTMLX.from_tensors(stored)
    results = dict(network.results(images))
    assert [result.dtype for result in results.values()] == [mx.bfloat16] * 6 + [mx.float32]
    found = np.array(results["image_features"])
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    snr_db = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
    assert snr_db > tolerance("encoder_mlx_bf16_results_snr_db")
    assert FastViTMLX.from_tensors(stored, mx.float32)(images).dtype == mx.float32


def test_bfloat16_weights_are_run_in_float32(tensors: dict[str, mx.array]) -> None:
    network = FastViTMLX.from_tensors({name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()})
    assert network(mx.zeros((1, 3, 128, 128))).dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_exp.reparam_conv.bias"), "1 missing: conv_exp.reparam_conv.bias"),
        (lambda t: t.update({"network.0.0.extra": mx.zeros(3)}), "1 unexpected: network.0.0.extra"),
        (
            lambda t: t.update({"patch_embed.blocks.0.reparam_conv.weight": mx.zeros((16, 3, 3, 3, 1))}),
            "must be .16, 3, 3, 3., got .16, 3, 3, 3, 1.",
        ),
        (
            lambda t: t.update({"network.7.0.norm.bias": t["network.7.0.norm.bias"] * float("nan")}),
            "network.7.0.norm.bias has NaN",
        ),
        (lambda t: t.pop("conv_exp.se.expand.weight"), "not a whole FastViT"),
    ],
)
def test_error_lists_tensors_when_they_are_not_an_encoder(
    tensors: dict[str, mx.array], change: Callable[[dict[str, mx.array]], object], message: str
) -> None:
    changed = dict(tensors)
    change(changed)
    with pytest.raises(WeightsError, match=message):
        FastViTMLX.from_tensors(changed)


def test_training_form_is_refused() -> None:
    apple = FastViT.from_checkpoint(RandomCheckpoint("tiny")).state_dict()
    with pytest.raises(WeightsError, match="training form"):
        FastViTMLX.from_tensors(mlx_tensors({name: tensor.numpy() for name, tensor in apple.items()}))
