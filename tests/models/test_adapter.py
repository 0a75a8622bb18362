"""LoRA adapters merged into a checkpoint: what comes out, and what is refused in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvlm.models.adapter import AdaptedCheckpoint
from fastvlm.models.errors import AdapterError
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import check_language_tensors

QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
TOWER = "model.vision_tower.vision_tower.model"
VISION = f"{TOWER}.network.0.0.convffn.fc1"


def factors(module: str, rank: int, seed: int = 0, prefix: str = "base_model.model.") -> dict[str, torch.Tensor]:
    """Random factors for a module of `random:tiny`, as PEFT names them."""
    shape = RandomCheckpoint("tiny").tensors[f"{module}.weight"].shape
    draw = torch.Generator().manual_seed(seed)
    columns, kernel = shape[1], shape[2:]
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn((rank, columns, *kernel), generator=draw),
        f"{prefix}{module}.lora_B.weight": torch.randn((shape[0], rank, *([1] * len(kernel))), generator=draw),
    }


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """An adapter's folder; options change `adapter_config.json`."""

    def write(tensors: dict[str, torch.Tensor], whole: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
        folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": False, **settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, folder / "adapter_model.safetensors")
        if whole:
            save_file(whole, folder / "non_lora_trainables.safetensors")
        return folder

    return write


def merged(folder: Path) -> AdaptedCheckpoint:
    return AdaptedCheckpoint(RandomCheckpoint("tiny"), folder)


def base(name: str) -> np.ndarray:
    return RandomCheckpoint("tiny").read(name, "pt")


def product(tensors: dict[str, torch.Tensor], module: str, prefix: str = "base_model.model.") -> np.ndarray:
    a, b = (tensors[f"{prefix}{module}.lora_{part}.weight"].double().flatten(1) for part in "AB")
    return (b @ a).numpy()


def test_factors_are_added_and_all_else_stays(write_adapter: Callable[..., Path]) -> None:
    tensors = factors(QUERY, 4) | factors(DOWN, 4, seed=1)
    checkpoint = merged(write_adapter(tensors))
    for module in (QUERY, DOWN):
        expected = base(f"{module}.weight") + 2 * product(tensors, module)
        for framework in ("pt", "mlx"):
            assert np.array_equal(checkpoint.read(f"{module}.weight", framework), expected.astype(np.float32))
    assert np.array_equal(checkpoint.read("model.norm.weight", "pt"), base("model.norm.weight"))
    check_language_tensors(checkpoint)
    assert checkpoint.digest() != RandomCheckpoint("tiny").digest()
    assert checkpoint.tensors.keys() == RandomCheckpoint("tiny").tensors.keys()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, 2.0),
        ({"alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj$": 2}}, 0.5),
        ({"r": 16, "rank_pattern": {"q_proj": 4}}, 2.0),
    ],
)
def test_scale_follows_the_config(write_adapter: Callable[..., Path], settings: dict[str, Any], scale: float) -> None:
    tensors = factors(QUERY, 4)
    expected = base(f"{QUERY}.weight") + scale * product(tensors, QUERY)
    ours = merged(write_adapter(tensors, **settings)).read(f"{QUERY}.weight", "pt")
    assert np.array_equal(ours, expected.astype(np.float32))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: name.replace("model.layers", "model.language_model.layers"),
    ],
)
def test_names_of_every_wrapper_are_understood(
    write_adapter: Callable[..., Path], rename: Callable[[str], str]
) -> None:
    tensors = factors(QUERY, 4)
    folder = write_adapter({rename(name): tensor for name, tensor in tensors.items()})
    expected = base(f"{QUERY}.weight") + 2 * product(tensors, QUERY)
    assert np.array_equal(merged(folder).read(f"{QUERY}.weight", "pt"), expected.astype(np.float32))


def test_convolutions_and_embeddings_take_factors_too(write_adapter: Callable[..., Path]) -> None:
    table = "model.embed_tokens"
    rows, width = RandomCheckpoint("tiny").tensors[f"{table}.weight"].shape
    a, b = torch.randn(4, rows), torch.randn(width, 4)
    embedding = {
        f"base_model.model.{table}.lora_embedding_A": a,
        f"base_model.model.{table}.lora_embedding_B": b,
    }
    tensors = factors(VISION, 4)
    checkpoint = merged(write_adapter(tensors | embedding))
    fc1 = base(f"{VISION}.weight")
    expected = fc1 + 2 * product(tensors, VISION).reshape(fc1.shape)
    assert np.array_equal(checkpoint.read(f"{VISION}.weight", "pt"), expected.astype(np.float32))
    expected = base(f"{table}.weight") + 2 * (b.double() @ a.double()).T.numpy()
    assert np.array_equal(checkpoint.read(f"{table}.weight", "pt"), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("apple", "native"),
    [
        ("patch_embed.0.rbr_conv.0.conv", "stem.0.conv_kxk.0.conv"),
        ("patch_embed.2.rbr_conv.0.conv", "stem.2.conv_kxk.0.conv"),
        ("conv_exp.rbr_conv.0.conv", "final_conv.conv_kxk.0.conv"),
        ("conv_exp.rbr_scale.conv", "final_conv.conv_scale.conv"),
    ],
)
def test_hf_names_of_stem_and_output_conv_are_understood(
    write_adapter: Callable[..., Path], apple: str, native: str
) -> None:
    module = f"{TOWER}.{apple}"
    tensors = factors(module, 4)
    named = {name.replace(module, f"model.vision_tower.timm_model.{native}"): one for name, one in tensors.items()}
    assert named.keys().isdisjoint(tensors)
    before = base(f"{module}.weight")
    expected = before + 2 * product(tensors, module).reshape(before.shape)
    found = merged(write_adapter(named)).read(f"{module}.weight", "pt")
    assert np.array_equal(found, expected.astype(np.float32))


def test_fully_trained_tensors_replace_the_checkpoints(write_adapter: Callable[..., Path]) -> None:
    projector, bias = torch.randn(128, 512).half(), torch.randn(128)
    checkpoint = merged(
        write_adapter(
            {f"base_model.model.{QUERY}.base_layer.bias": bias},
            whole={"base_model.model.model.mm_projector.0.weight": projector},
        )
    )
    assert np.array_equal(checkpoint.read("model.mm_projector.0.weight", "pt"), projector.float().numpy())
    assert np.array_equal(checkpoint.read(f"{QUERY}.bias", "pt"), bias.numpy())


def test_head_that_was_trained_unties_the_embeddings(write_adapter: Callable[..., Path]) -> None:
    head = torch.randn(1024, 128)
    checkpoint = merged(write_adapter({"base_model.model.lm_head.modules_to_save.default.weight": head}))
    assert not checkpoint.config.decoder.tie_word_embeddings
    assert "the weights decide" in checkpoint.notes[-1]
    assert np.array_equal(np.array(mx.array(checkpoint.read("lm_head.weight", "mlx"))), head.numpy())
    check_language_tensors(checkpoint)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 128)}, {}, "1 tensors do not"),
        ({f"base_model.model.{QUERY}.lora_magnitude_vector": torch.zeros(128)}, {}, "do not belong to random:tiny"),
        ({f"base_model.model.{QUERY}.lora_B.bias": torch.zeros(128)}, {}, "do not belong to random:tiny"),
        ({f"base_model.model.{QUERY}.lora_A.weight": torch.zeros(4, 128)}, {}, "one of two factors"),
        (factors(QUERY, 8), {}, r"has r=4 for model.layers.1.self_attn.q_proj, but its factors have rank 8"),
        (factors(QUERY, 4), {"lora_alpha": None}, "lora_alpha must be a positive number"),
        (factors(QUERY, 4), {"lora_alpha": float(2**80) * -1}, "lora_alpha must be a positive number"),
        (factors(QUERY, 4), {"peft_type": "IA3"}, "peft_type must be 'LORA'"),
        (factors(QUERY, 4), {"use_dora": True}, "use_dora is not supported"),
        (factors(QUERY, 4), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is not supported"),
        (factors(QUERY, 4), {"rank_pattern": {"(.+)+q_proj": 4}}, "must have names or simple patterns such as"),
        (factors(QUERY, 4), {"rank_pattern": [4]}, "rank_pattern must be an object"),
        ({}, {}, "nothing to merge"),
        ({"base_model.model.model.norm.weight": torch.zeros(5)}, {}, r"the checkpoint's shape \[128\], got \[5\]"),
        ({f"base_model.model.{QUERY}.lora_A.weight": torch.zeros(4, 99),
          f"base_model.model.{QUERY}.lora_B.weight": torch.zeros(128, 4)}, {}, r"must multiply to shape \[128, 128\]"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128),
          "base_model.model.lm_head.lora_B.weight": torch.zeros(1024, 4)}, {}, "ties to its embeddings"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(
    write_adapter: Callable[..., Path], tensors: dict[str, torch.Tensor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        merged(write_adapter(tensors, **settings))
    assert "\n" not in str(caught.value)


def test_pickles_and_other_folders_are_refused(write_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_adapter(factors(QUERY, 4))
    (folder / "non_lora_trainables.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"non_lora_trainables.bin is a pickle.*save_file.*safetensors"):
        merged(folder)
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        merged(tmp_path)


def test_fan_in_fan_out_is_left_aside_as_peft_does(write_adapter: Callable[..., Path]) -> None:
    tensors = factors(DOWN, 4)
    checkpoint = merged(write_adapter(tensors, fan_in_fan_out=True))
    expected = base(f"{DOWN}.weight") + 2 * product(tensors, DOWN)
    assert np.array_equal(checkpoint.read(f"{DOWN}.weight", "pt"), expected.astype(np.float32))
    assert "fan_in_fan_out" in checkpoint.notes[-1]
