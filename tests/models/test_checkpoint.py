"""Checkpoint folders: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvlm.models.checkpoint import FolderCheckpoint, check_tensors
from fastvlm.models.errors import CheckpointError, ConfigError, WeightsError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import check_language_tensors

WriteCheckpoint = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
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


def test_head_and_step_counters_are_expected(write_checkpoint: WriteCheckpoint) -> None:
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


def test_error_when_a_folder_is_not_a_checkpoint(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
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
def test_error_when_the_config_has_another_layout(tmp_path: Path, tensor: str, layout: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({tensor: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model_type must be .*{layout}.*got None"):
        FolderCheckpoint(tmp_path)


def test_error_when_the_layout_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.layers.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Hugging Face native, mlx-vlm.*'llama' and tensors .*model.layers.0"):
        FolderCheckpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"hidden_size": NaN}', "[" * 100_000, "\xff\xfe"])
def test_malformed_config_is_one_line(write_checkpoint: WriteCheckpoint, text: str) -> None:
    folder = write_checkpoint()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config.json") as caught:
        FolderCheckpoint(folder)
    assert "\n" not in str(caught.value)


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


def renamed(before: str, after: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(before, after, 1) if before else after + name] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "module.base_model.model."),
        ("self_attn.", "_fsdp_wrapped_module.self_attn."),
    ],
)
def test_names_of_training_wrappers_are_understood(write_checkpoint: WriteCheckpoint, before: str, after: str) -> None:
    source, checkpoint = RandomCheckpoint("tiny"), FolderCheckpoint(write_checkpoint(renamed(before, after)))
    assert checkpoint.tensors == source.tensors
    assert "the names of" in checkpoint.notes[0]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(checkpoint.read(name, "pt").numpy(), source.read(name, "pt"))
    assert np.array_equal(np.array(checkpoint.read(name, "mlx")), source.read(name, "pt"))


def test_prefix_of_some_tensors_alone_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "vision_tower" in name:
                tensors[f"module.{name}"] = tensors.pop(name)

    with pytest.raises(CheckpointError, match="has a decoder and a projector without|no tensor has the name"):
        FolderCheckpoint(write_checkpoint(change))


def test_lora_that_is_not_merged_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.lora_A.default.weight"] = torch.zeros(4, 128)

    with pytest.raises(WeightsError, match="contain a LoRA that is not merged.*merge_and_unload"):
        FolderCheckpoint(write_checkpoint(change))


def test_buffers_of_older_libraries_are_not_needed(write_checkpoint: WriteCheckpoint) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
        tensors["model.image_newline"] = torch.zeros(128)

    assert FolderCheckpoint(write_checkpoint(change)).tensors == RandomCheckpoint("tiny").tensors


def test_float64_is_read_as_float32(write_checkpoint: WriteCheckpoint) -> None:
    source, checkpoint = RandomCheckpoint("tiny"), FolderCheckpoint(write_checkpoint(dtype=torch.float64))
    assert checkpoint.tensors.keys() == source.tensors.keys()
    check_language_tensors(checkpoint)
    for name in ("model.norm.weight", "model.mm_projector.0.weight"):
        assert checkpoint.tensors[name].dtype == "F32"
        assert checkpoint.read(name, "pt").dtype == torch.float32
        assert np.array_equal(np.array(checkpoint.read(name, "mlx")), source.read(name, "pt"))


def test_tensors_next_to_a_float64_one_are_read_by_mlx(write_checkpoint: WriteCheckpoint) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
        tensors["model.mm_projector.0.bias"] = tensors["model.mm_projector.0.bias"].bfloat16()

    checkpoint = FolderCheckpoint(write_checkpoint(change))
    bias = torch.from_numpy(RandomCheckpoint("tiny").read("model.mm_projector.0.bias", "pt")).bfloat16()
    assert np.array_equal(np.array(checkpoint.read("model.mm_projector.0.bias", "mlx")), bias.float().numpy())


def test_template_of_a_processor_is_used_without_another(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template + "{# own #}"}))
    assert "own" not in str(FolderCheckpoint(folder).tokenizer_files().get("chat_template.jinja"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert FolderCheckpoint(folder).tokenizer_files()["chat_template.jinja"] == f"{template}{{# own #}}".encode()


def test_pickles_are_read_only_if_allowed(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="found the pickle pytorch_model.bin.*allow_pickle=True"):
        FolderCheckpoint(folder)


def test_empty_tensors_of_zero_3_name_their_cause(write_checkpoint: WriteCheckpoint) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers." in name:
                tensors[name] = torch.zeros(0)

    with pytest.raises(WeightsError, match="36 tensors are empty, as DeepSpeed's ZeRO-3 saves them.*zero_to_fp32.py"):
        FolderCheckpoint(write_checkpoint(change))


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "CLIP or SigLIP"),
        ("visual.blocks.0.attn.qkv.weight", "Qwen-VL"),
    ],
)
def test_vision_encoder_of_another_model_is_named(write_checkpoint: WriteCheckpoint, name: str, tower: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for found in [found for found in tensors if "vision_tower" in found]:
            del tensors[found]
        tensors[name] = torch.zeros(4, 4)

    with pytest.raises(CheckpointError, match=f"is another model: its vision encoder is that of {tower}"):
        FolderCheckpoint(write_checkpoint(change))


def test_model_type_of_llava_next_is_read_as_apples(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    edit_config(folder, model_type="llava_qwen", architectures=["LlavaQwenForCausalLM"])
    assert FolderCheckpoint(folder).config_dict["model_type"] == "llava_qwen2"


def test_config_of_newer_transformers_is_read(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    before = FolderCheckpoint(folder).config
    edit_config(
        folder,
        torch_dtype=...,
        dtype="bfloat16",
        rope_theta=...,
        rope_parameters={"rope_theta": before.decoder.rope_theta, "rope_type": "default"},
        layer_types=["full_attention"] * before.decoder.num_hidden_layers,
    )
    assert FolderCheckpoint(folder).config == before
