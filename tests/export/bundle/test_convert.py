"""A stranger's model folder as the source of a bundle: what is odd in its JSON is passed over, or told in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.export.bundle.write import bundle
from fastvlm.models.errors import ConfigError


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed(file, **values)`: a copy of the MLX folder, without its manifest unless that is what changes."""

    def change(file: str, **values: Any) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(folders["mlx"], folder)
        content = json.loads((folder / file).read_text())
        (folder / "fastvlm.json").unlink()
        (folder / file).write_text(json.dumps({**content, **values}))
        return folder

    return change


@pytest.mark.parametrize("value", [3, "x", [1], None, {"5": {"content": "x"}}])
def test_list_of_added_tokens_may_be_anything(changed: Callable[..., Path], tmp_path: Path, value: Any) -> None:
    source = changed("tokenizer_config.json", added_tokens_decoder=value)
    written = bundle(source, "mlx-swift-lm", tmp_path / "to").path
    listed = json.loads((written / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert "<|im_end|>" in {token["content"] for token in listed.values()}


@pytest.mark.parametrize("notes", [7, None, "text", ["a note", 3]])
def test_notes_of_a_manifest_may_be_anything(changed: Callable[..., Path], tmp_path: Path, notes: Any) -> None:
    source = changed("fastvlm.json", notes=notes)
    assert ("a note" in bundle(source, "mlx-swift-lm", tmp_path / "to").notes) == isinstance(notes, list)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", None), ("num_attention_heads", {}), ("max_position_embeddings", "x")]
)
def test_sizes_that_are_none_are_told(changed: Callable[..., Path], tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        bundle(changed("config.json", **{name: value}), "mlx-swift-lm", tmp_path / "to")
    assert not (tmp_path / "to").exists()
