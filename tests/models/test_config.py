"""The fields of `config.json`, read from checkpoint folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import ConfigError

WriteCheckpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be of type int"),
        ({"hidden_size": True}, "'hidden_size' must be of type int"),
        ({"hidden_size": 10**9}, "hidden_size must be between"),
        ({"hidden_size": -4}, "hidden_size must be between"),
        ({"num_attention_heads": 7}, "does not divide"),
        ({"num_key_value_heads": 3}, "not a multiple of"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive"),
        ({"hidden_act": "gelu"}, "must be 'silu'"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "max_position_embeddings must be"),
        ({"use_sliding_window": True, "sliding_window": "long"}, "'sliding_window' must be of type int"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "default rope_type, got 'yarn'"),
        ({"mm_vision_tower": 7}, "'mm_vision_tower' must be of type str"),
        ({"mm_vision_tower": "mobileclip_l_100"}, "multiple of 64"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "cuts images into tiles"),
        ({"image_aspect_ratio": "anyres_max_9"}, "cuts images into tiles"),
        ({"image_aspect_ratio": "stretch"}, "'pad' or 'crop'"),
        ({"eos_token_id": "stop"}, "eos_token_id must be"),
        ({"model_type": "llama"}, "model_type must be 'llava_qwen2'"),
    ],
)
def test_contradictory_configs_are_refused(
    write_checkpoint: WriteCheckpoint, changes: dict[str, object], message: str
) -> None:
    folder = write_checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        FolderCheckpoint(folder)


def test_rope_theta_and_eos_are_read_from_newer_keys(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    edit_config(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5}, eos_token_id=...)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = FolderCheckpoint(folder).config
    assert config.decoder.rope_theta == 5e5
    assert config.eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("tower", "image_size", "noted"),
    [
        ("mobileclip_l_1024", 1024, False),
        ("/home/me/ckpt/mobileclip_l_256/", 256, False),
        ("apple/mobileclip_l_512-hd", 512, False),
        ("/ckpt/fastvithd_768", 768, False),
        ("/ckpt/llava-fastvithd_0.5b_stage3", 1024, True),
        ("/ckpt/run_7/checkpoint_3200", 1024, True),
        ("openai/clip-vit-large-patch14-336", 1024, True),
        (None, 1024, True),
        (..., 1024, True),
    ],
)
def test_image_size_is_read_from_any_towers_name(
    write_checkpoint: WriteCheckpoint, tower: object, image_size: int, noted: bool
) -> None:
    folder = write_checkpoint()
    edit_config(folder, mm_vision_tower=tower)
    checkpoint = FolderCheckpoint(folder)
    assert checkpoint.config.image_size == image_size
    assert any("1024 px are assumed" in note for note in checkpoint.notes) == noted


@pytest.mark.parametrize(("written", "fit"), [("pad", "pad"), ("square", "crop"), ("crop", "crop"), (None, "pad")])
def test_aspect_ratio_has_llavas_meaning(write_checkpoint: WriteCheckpoint, written: str | None, fit: str) -> None:
    folder = write_checkpoint()
    edit_config(folder, image_aspect_ratio=written)
    assert FolderCheckpoint(folder).config.image_aspect_ratio == fit


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 0}, 300),
        ({"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 99}, None),
        ({"use_sliding_window": True, "sliding_window": 10**6, "max_window_layers": 0}, None),
        ({"use_sliding_window": False, "sliding_window": 300, "max_window_layers": 0}, None),
    ],
)
def test_context_stays_within_a_sliding_window(
    write_checkpoint: WriteCheckpoint, changes: dict[str, object], context: int | None
) -> None:
    folder = write_checkpoint()
    before = FolderCheckpoint(folder)
    edit_config(folder, **changes)
    checkpoint = FolderCheckpoint(folder)
    assert checkpoint.config.max_context == (context or before.config.max_context)
    assert any("sliding window" in note for note in checkpoint.notes) == (context is not None)
