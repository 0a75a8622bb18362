"""Checkpoint folders: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastvlm.models.checkpoint import FolderCheckpoint, check_tensors
from fastvlm.models.errors import CheckpointError, ConfigError, FastVLMError, ModelReferenceError, WeightsError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.models.safetensors_files import read_header

WriteCheckpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def test_tensors_come_back_as_they_were_written(write_checkpoint: WriteCheckpoint) -> None:
    source, checkpoint = RandomCheckpoint("tiny"), FolderCheckpoint(write_checkpoint())
    assert checkpoint.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        assert np.array_equal(checkpoint.read(name, "pt").numpy(), source.read(name, "pt"))
        assert np.array_equal(np.array(checkpoint.read(name, "mlx")), source.read(name, "mlx"))
    assert checkpoint.notes == ()
    assert checkpoint.config == source.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_read_by_both_frameworks(
    write_checkpoint: WriteCheckpoint, dtype: torch.dtype
) -> None:
    checkpoint = FolderCheckpoint(write_checkpoint(dtype=dtype))
    name = "model.norm.weight"
    expected = torch.from_numpy(RandomCheckpoint("tiny").read(name, "pt")).to(dtype).float().numpy()
    assert np.array_equal(checkpoint.read(name, "pt").float().numpy(), expected)
    import mlx.core as mx

    assert np.array_equal(np.array(checkpoint.read(name, "mlx").astype(mx.float32)), expected)


def test_shards_are_read_as_one(write_checkpoint: WriteCheckpoint) -> None:
    whole, sharded = FolderCheckpoint(write_checkpoint()), FolderCheckpoint(write_checkpoint(shards=3))
    assert sharded.tensors == whole.tensors
    assert torch.equal(sharded.read("model.norm.weight", "pt"), whole.read("model.norm.weight", "pt"))


def test_shard_index_that_disagrees_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.wait"] = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"disagree on 2 tensors: model.norm.wait, model.norm.weight"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_shard_outside_the_folder_is_refused(write_checkpoint: WriteCheckpoint, name: str) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="outside the folder"):
        FolderCheckpoint(folder)


def test_missing_shard_is_named(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(shards=2)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors does not exist"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(write_checkpoint: WriteCheckpoint, keep: int) -> None:
    folder = write_checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        FolderCheckpoint(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_never_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "damaged.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        header = read_header(file)
    except WeightsError:
        return
    assert all(isinstance(info.shape, tuple) for info in header.values())


def test_missing_and_unexpected_tensors_are_listed(write_checkpoint: WriteCheckpoint) -> None:
    prefix = "model.vision_tower.vision_tower.model."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{prefix}conv_exp.se.reduce.bias"]
        tensors[f"{prefix}network.0.0.extra"] = torch.zeros(1)
        tensors[f"{prefix}network.0.0.layer_scale"] = torch.zeros(3, 1, 1)

    checkpoint = FolderCheckpoint(write_checkpoint(change=change))
    with pytest.raises(WeightsError) as caught:
        FastViT.from_checkpoint(checkpoint)
    message = str(caught.value)
    assert "1 missing: conv_exp.se.reduce.bias" in message
    assert "1 unexpected: network.0.0.extra" in message
    assert "network.0.0.layer_scale must be [16, 1, 1], got [3, 1, 1]" in message


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(WeightsError, match=r"20 missing: t0, t1, t10, t11, t12, t13 and 14 more"):
        check_tensors({f"t{i}": (1,) for i in range(20)}, {}, "thing")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_encoder_weights_that_are_not_finite_are_refused(write_checkpoint: WriteCheckpoint, value: float) -> None:
    name = "model.vision_tower.vision_tower.model.network.0.0.convffn.fc1.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    with pytest.raises(WeightsError, match=r"network.0.0.convffn.fc1.weight has NaN"):
        FastViT.from_checkpoint(FolderCheckpoint(write_checkpoint(change=change)))


def test_head_and_step_counters_are_no_surprise(write_checkpoint: WriteCheckpoint) -> None:
    prefix = "model.vision_tower.vision_tower.model."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{prefix}head.proj"] = torch.zeros(512, 16)
        tensors[f"{prefix}network.0.0.convffn.conv.bn.num_batches_tracked"] = torch.tensor(7)

    FastViT.from_checkpoint(FolderCheckpoint(write_checkpoint(change=change)))


def test_width_that_contradicts_the_config_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    edit_config(folder, mm_hidden_size=768)
    with pytest.raises(WeightsError, match=r"mm_hidden_size=768, but the encoder has 512"):
        FastViT.from_checkpoint(FolderCheckpoint(folder))


def test_weights_decide_whether_embeddings_are_tied(write_checkpoint: WriteCheckpoint) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    untied = FolderCheckpoint(write_checkpoint(change=untie))
    assert not untied.config.decoder.tie_word_embeddings
    assert "tie_word_embeddings=True" in untied.notes[0]
    redundant = FolderCheckpoint(write_checkpoint(change=repeat))
    assert redundant.config.decoder.tie_word_embeddings
    assert redundant.notes == ()


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle pytorch_model.bin.*save_file"):
        FolderCheckpoint(folder)


def test_folders_that_are_no_checkpoints_are_told_apart(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json.*the folder is empty"):
        FolderCheckpoint(tmp_path / "empty")
    folder = write_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        ("model.vision_tower.timm_model.stem.0.weight", "Hugging Face"),
        ("vision_tower.vision_model.stem.weight", "mlx-vlm"),
    ],
)
def test_config_of_another_layout_is_told(tmp_path: Path, tensor: str, layout: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({tensor: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model_type must be .*{layout}.*got None"):
        FolderCheckpoint(tmp_path)


def test_unknown_layout_is_named_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.layers.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Hugging Face native, mlx-vlm.*'llama' and tensors .*model.layers.0"):
        FolderCheckpoint(tmp_path)


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


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"hidden_size": NaN}', "[" * 100_000, "\xff\xfe"])
def test_malformed_config_is_one_line(write_checkpoint: WriteCheckpoint, text: str) -> None:
    folder = write_checkpoint()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config.json") as caught:
        FolderCheckpoint(folder)
    assert "\n" not in str(caught.value)


def test_rope_theta_and_eos_are_found_where_they_stand(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    edit_config(folder, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5}, eos_token_id=...)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = FolderCheckpoint(folder).config
    assert config.decoder.rope_theta == 5e5
    assert config.eos_token_ids == (7, 9)


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_random_sizes_have_the_published_dimensions(golden: Path, size: str) -> None:
    published = json.loads((golden / "configs" / f"fastvlm-{size}.config.json").read_text())
    ours = RandomCheckpoint(size).config_dict
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "tie_word_embeddings", "mm_hidden_size", "mm_vision_tower", "rms_norm_eps", "rope_theta",
                "max_position_embeddings", "tokenizer_model_max_length", "image_aspect_ratio"):  # fmt: skip
        assert ours[key] == published[key], key


def test_random_tensors_repeat_and_differ_by_name_and_seed() -> None:
    first, again, other = RandomCheckpoint("tiny"), RandomCheckpoint("tiny"), RandomCheckpoint("tiny", seed=1)
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(first.read(a, "pt"), again.read(a, "pt"))
    assert not np.array_equal(first.read(a, "pt"), first.read(b, "pt"))
    assert not np.array_equal(first.read(a, "pt"), other.read(a, "pt"))
    assert first.digest() == again.digest() != other.digest()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("random:9b", "random:9b is unknown"),
        ("nobody/FastVLM-0.5B", "fastvlm download nobody/FastVLM-0.5B"),
        ("0.5b-stage3", "fastvlm download 0.5b-stage3"),
        ("no such thing", "neither a folder"),
        (__file__, "is a file"),
    ],
)
def test_unknown_references_say_what_there_is(reference: str, message: str) -> None:
    with pytest.raises(ModelReferenceError, match=message) as caught:
        open_checkpoint(reference)
    assert isinstance(caught.value, FastVLMError)


def test_reading_one_tensor_after_the_other_does_not_keep_them(write_checkpoint: WriteCheckpoint) -> None:
    import mlx.core as mx

    checkpoint = FolderCheckpoint(write_checkpoint(dtype=torch.bfloat16))
    largest = max(int(np.prod(info.shape)) for info in checkpoint.tensors.values())
    before = mx.get_active_memory()
    for name in checkpoint.tensors:
        mx.eval(checkpoint.read(name, "mlx").astype(mx.float32))
    assert mx.get_active_memory() - before < 6 * largest


def test_head_that_should_be_there_is_missed(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"1 missing: lm_head.weight"):
        FolderCheckpoint(folder)
