"""`export --adapter`: the folder holds and computes what the merged checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvlm.export.exporter import export
from fastvlm.export.verify import verify
from fastvlm.models.folder_layout import saved_weights
from fastvlm.models.references import open_checkpoint

pytestmark = pytest.mark.slow

MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    draw = torch.Generator().manual_seed(0)
    tensors = {"A": torch.randn((4, 384), generator=draw), "B": torch.randn((128, 4), generator=draw)}
    named = {f"base_model.model.{MODULE}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_adapter_is_in_the_exported_weights_and_verified(tmp_path: Path, adapter: Path) -> None:
    result = export("random:tiny", tmp_path / "model", adapter=adapter, quant="fp16", decoder_bits=16)
    assert not result.trained
    assert result.checkpoint == "random:tiny+adapter"
    saved = saved_weights(tmp_path / "model")[f"language_model.{MODULE}.weight"]
    merged = open_checkpoint("random:tiny", adapter).read(f"{MODULE}.weight", "pt")
    assert np.array_equal(np.array(saved), merged.astype(np.float16))
    assert verify(tmp_path / "model", "random:tiny", adapter=adapter).passed
    unmerged = verify(tmp_path / "model", "random:tiny")
    assert "down_proj" in " ".join(unmerged.failures)
