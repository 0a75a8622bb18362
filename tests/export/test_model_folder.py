"""The configs of an exported folder, and the table of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvlm.export.exporter import export

pytestmark = pytest.mark.slow


def test_config_names_what_clients_size_by(write_checkpoint: Callable, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000]

    source = write_checkpoint(change=cut)
    config = json.loads((source / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (source / "config.json").write_text(json.dumps(config))
    exported = export(source, tmp_path / "model", quant="fp16").folder / "config.json"
    assert json.loads(exported.read_text())["vocab_size"] == 1000
    assert json.loads(exported.read_text())["rope_theta"] == 5e5


def test_image_size_is_carried_through(tmp_path: Path) -> None:
    result = export("random:tiny", out=tmp_path / "model", quant="fp16", image_size=128)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["mm_vision_tower"] == "mobileclip_l_128"
    preprocessor = json.loads((result.folder / "preprocessor_config.json").read_text())
    assert preprocessor["crop_size"] == {"height": 128, "width": 128}
