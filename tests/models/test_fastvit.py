"""FastViT in both forms, against the reference implementation's numbers and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.models.fastvit import FastViT, identity_kernel
from fastvlm.models.fastvit_config import FastViTConfig
from fastvlm.models.random_checkpoint import RandomCheckpoint, encoder_shapes


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    assert torch.isfinite(expected).all()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def tiny_encoder() -> FastViT:
    return FastViT.from_checkpoint(RandomCheckpoint("tiny"))


@pytest.mark.parametrize("form", ["train", "reparam"])
@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("size", [256, 320])
def test_features_match_the_reference(
    golden: Path, tolerance: Callable[[str], float], form: str, reparameterize: bool, size: int
) -> None:
    state = load_file(golden / f"fastvit_small_{form}.safetensors")
    config = FastViTConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert config.reparameterized == (form == "reparam")
    encoder = FastViT(config).eval().requires_grad_(False)
    encoder.load_state_dict(state, strict=True)
    if reparameterize:
        encoder.reparameterize()
    numbers = np.load(golden / "fastvit_small_io.npz")
    found = encoder(torch.from_numpy(numbers[f"images_{size}"]))
    expected = torch.from_numpy(numbers[f"image_features_{size}"])
    assert relative_error(found, expected) < tolerance("encoder_float32")


def test_reparameterizing_keeps_every_stage_and_is_idempotent(
    images: torch.Tensor, tolerance: Callable[[str], float]
) -> None:
    encoder = tiny_encoder()
    assert not encoder.config.reparameterized
    x = encoder.patch_embed(images)
    before = [x] + [x := part(x) for part in encoder.network] + [encoder.features(x)]
    encoder.reparameterize()
    once = {name: tensor.clone() for name, tensor in encoder.state_dict().items() if not name.endswith("tracked")}
    encoder.reparameterize()
    twice = encoder.state_dict()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not any("rbr_" in name or "lkb_origin" in name or name.endswith(".pe.weight") for name in twice)
    x = encoder.patch_embed(images)
    after = [x] + [x := part(x) for part in encoder.network] + [encoder.features(x)]
    for stage, (training, folded) in enumerate(zip(before, after, strict=True)):
        assert relative_error(folded, training) < tolerance("encoder_float32"), f"part {stage}"


def test_reparameterized_form_has_the_published_names() -> None:
    names = set(encoder_shapes(FastViTConfig()))
    for name in (
        "patch_embed.0.reparam_conv.weight",
        "network.0.1.convffn.conv.bn.running_var",
        "network.1.proj.0.lkb_reparam.weight",
        "network.1.proj.1.reparam_conv.bias",
        "network.6.reparam_conv.weight",
        "network.7.3.token_mixer.qkv.weight",
        "network.10.1.layer_scale_2",
        "conv_exp.se.reduce.weight",
    ):
        assert name in names


def test_fastvithd_has_125_million_parameters() -> None:
    count = sum(np.prod(shape) for name, shape in encoder_shapes(FastViTConfig()).items() if "running" not in name)
    assert 122e6 < count < 126e6


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (8, 1), (8, 2)])
def test_identity_kernel_returns_its_input(channels: int, groups: int) -> None:
    x = torch.rand(1, channels, 5, 5, dtype=torch.float64)
    kernel = identity_kernel(channels, groups, 3)
    assert torch.equal(torch.nn.functional.conv2d(x, kernel, padding=1, groups=groups), x)
