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
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "default rope_type, got 'yarn'"),
        ({"mm_vision_tower": "clip"}, "mm_vision_tower must end in the image size"),
        ({"mm_vision_tower": "mobileclip_l_100"}, "multiple of 64"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "'pad' or 'crop'"),
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
