"""The files of a bundle, also from untrusted model folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.export.bundle.write import bundle
from fastvlm.models.errors import ConfigError
from fastvlm.models.files import read_json_object


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
def test_invalid_sizes_are_one_line(changed: Callable[..., Path], tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        bundle(changed("config.json", **{name: value}), "mlx-swift-lm", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_mlx_bundle_describes_its_encoder(bundles: dict[str, Path]) -> None:
    config = read_json_object(bundles["mlx-swift-lm"] / "config.json")
    assert "image_token_index" not in config
    assert config["eos_token_id"] == 1022
    assert config["vision_config"]["layers"] == [1, 2, 2, 1, 1]
    assert config["vision_config"]["pos_embs_shapes"] == [None, None, None, [7, 7], [7, 7]]
    settings = read_json_object(bundles["mlx-swift-lm"] / "tokenizer_config.json")
    assert "part['type'] == 'image'" in settings["chat_template"]


def test_template_gives_the_training_prompt(bundles: dict[str, Path], folders: dict[str, Path]) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = read_json_object(bundles["mlx-swift-lm"] / "tokenizer_config.json")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        settings["chat_template"]
    )
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    for content in (parts, "<image>\nWhat is this?"):
        messages = [{"role": "user", "content": content}]
        assert template.render(messages=messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize("given", [None, True, False])
def test_spaces_are_kept_unless_the_tokenizer_says_so(folders: dict[str, Path], tmp_path: Path, given: object) -> None:
    folder = shutil.copytree(folders["mlx"], tmp_path / "model")
    (folder / "fastvlm.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings.pop("clean_up_tokenization_spaces") is False  # exports have it
    if given is not None:
        settings["clean_up_tokenization_spaces"] = given
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    written = bundle(folder, "mlx-swift-lm", tmp_path / "b").path / "tokenizer_config.json"
    assert json.loads(written.read_text())["clean_up_tokenization_spaces"] is bool(given)
