"""Random checkpoints: dimensions and repeatability."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.random_checkpoint import RandomCheckpoint

WriteCheckpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_random_sizes_have_the_published_dimensions(golden: Path, size: str) -> None:
    published = json.loads((golden / "configs" / f"fastvlm-{size}.config.json").read_text())
    ours = RandomCheckpoint(size).config_dict
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "tie_word_embeddings", "mm_hidden_size", "mm_vision_tower", "rms_norm_eps", "rope_theta",
                "max_position_embeddings", "tokenizer_model_max_length", "image_aspect_ratio"):  # fmt: skip
        assert ours[key] == published[key], key


def test_random_tensors_depend_on_name_and_seed_only() -> None:
    first, again, other = RandomCheckpoint("tiny"), RandomCheckpoint("tiny"), RandomCheckpoint("tiny", seed=1)
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(first.read(a, "pt"), again.read(a, "pt"))
    assert not np.array_equal(first.read(a, "pt"), first.read(b, "pt"))
    assert not np.array_equal(first.read(a, "pt"), other.read(a, "pt"))
    assert first.digest() == again.digest() != other.digest()
