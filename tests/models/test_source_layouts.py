"""Checkpoints in Hugging Face's and mlx-vlm's layout: read as Apple's, and written back without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm.export.rewrite import projected
from fastvlm.models.checkpoint import Checkpoint, FolderCheckpoint
from fastvlm.models.errors import CheckpointError, ConfigError, WeightsError
from fastvlm.models.fastvit import FastViT
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.quant.decoder import check_language_tensors

from ..checkpoint_writer import write_checkpoint as write_to

HEAD = "model.vision_tower.vision_tower.model.head."


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written("hf")`: `random:tiny` in that layout; `change(config)` edits its config.json."""

    def write(layout: str, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        folder = tmp_path / f"{layout}-{len(list(tmp_path.iterdir()))}"
        write_to(RandomCheckpoint("tiny"), folder, layout)
        if change:
            config = json.loads((folder / "config.json").read_text())
            change(config)
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def assert_same_tensors(checkpoint: Checkpoint, source: Checkpoint, but: tuple[str, ...] = ()) -> None:
    names = {name for name in source.tensors if not any(part in name for part in but)}
    assert checkpoint.tensors.keys() == names
    for name in names:
        assert checkpoint.tensors[name] == source.tensors[name], name
        for framework in ("pt", "mlx"):
            ours, theirs = checkpoint.read(name, framework), source.read(name, framework)
            assert ours.dtype == theirs.dtype
            same = torch.equal(ours, theirs) if framework == "pt" else mx.array_equal(ours, theirs).item()
            assert same, f"{name} ({framework})"


def test_hugging_face_checkpoint_gives_the_reference_numbers(
    golden: Path, language_side: Callable, tolerance: Callable[[str], float]
) -> None:
    checkpoint = FolderCheckpoint(golden / "hf_fast_vlm_small")
    assert checkpoint.layout == "Hugging Face native"
    expected = np.load(golden / "hf_fast_vlm_small" / "expected.npz")
    check_language_tensors(checkpoint)
    with torch.inference_mode():
        features = FastViT.from_checkpoint(checkpoint)(torch.from_numpy(expected["pixel_values"]))
    ours = projected(checkpoint, [features.numpy()])[0]
    assert np.isfinite(ours).all()
    assert np.abs(ours - expected["projected"]).max() < tolerance("projected_float32")

    side = language_side(checkpoint)
    decoder, ids = side.language_model, expected["input_ids"]
    image = side.multi_modal_projector(mx.array(features.numpy()))  # (1, 16, D)
    embeds = decoder.embed(mx.array(np.where(ids == 639, 0, ids)[None]))  # (1, L, D)
    first = int(np.argmax(ids == 639))
    embeds = mx.concatenate([embeds[:, :first], image, embeds[:, first + 16 :]], axis=1)
    cache = decoder.make_cache()
    logits = decoder(embeds, cache, all_positions=True)
    assert np.abs(np.array(logits[0]) - expected["logits"]).max() < tolerance("decoder_logits_float32")

    greedy = [int(mx.argmax(logits[0, -1]).item())]
    while len(greedy) < len(expected["greedy_ids"]):
        logits = decoder(decoder.embed(mx.array([[greedy[-1]]])), cache)
        greedy.append(int(mx.argmax(logits[0, -1]).item()))
    assert greedy == expected["greedy_ids"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
@pytest.mark.parametrize(("layout", "but"), [("hf", (HEAD,)), ("mlx", ("num_batches_tracked",))])
def test_round_trips_keep_every_bit(golden: Path, tmp_path: Path, name: str, layout: str, but: tuple[str, ...]) -> None:
    source = FolderCheckpoint(golden / name)
    write_to(source, tmp_path / "there", layout)
    there = FolderCheckpoint(tmp_path / "there")
    assert_same_tensors(there, source, but)
    assert there.config == source.config
    assert there.notes == ()
    write_to(there, tmp_path / "back", "apple")
    back = FolderCheckpoint(tmp_path / "back")
    assert back.layout == "Apple LLaVA"
    assert_same_tensors(back, source, but)
    assert dict(back.tokenizer_files()) == dict(source.tokenizer_files())


def test_written_hugging_face_names_are_transformers_own(golden: Path, tmp_path: Path) -> None:
    write_to(FolderCheckpoint(golden / "llava_small_reparam_tied"), tmp_path / "hf", "hf")
    theirs = load_file(golden / "hf_fast_vlm_small" / "model.safetensors").keys()
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == theirs - {"lm_head.weight"}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("hf", torch.bfloat16), ("mlx", torch.float16), ("mlx", torch.bfloat16)])
def test_half_precision_and_shards_survive(
    write_checkpoint: Callable[..., Path], tmp_path: Path, layout: str, dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fastvlm.models.safetensors_files.MAX_SHARD_BYTES", 200_000)
    source = FolderCheckpoint(write_checkpoint(dtype=dtype, shards=2))
    write_to(source, tmp_path / "there", layout)
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 3
    assert_same_tensors(FolderCheckpoint(tmp_path / "there"), source)


def quantize(folder: Path, bits: int, group_size: int, **config: Any) -> None:
    """Quantizes a folder's language side as mlx-vlm's `convert -q` does."""
    weights, stored = mx.load(str(folder / "model.safetensors")), {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer != name and weight.ndim == 2 and ("language_model" in name or "qkv" in name):
            parts = mx.quantize(weight, group_size=group_size, bits=bits)
            stored.update(zip((name, f"{layer}.scales", f"{layer}.biases"), parts, strict=True))
        else:
            stored[name] = weight
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    described = {"quantization": {"group_size": group_size, "bits": bits}, **config}
    whole = {**json.loads((folder / "config.json").read_text()), **described}
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32), (6, 64)])
def test_quantized_mlx_folder_is_expanded_as_in_mlx(written: Callable[..., Path], bits: int, group_size: int) -> None:
    folder = written("mlx")
    quantize(folder, bits, group_size)
    checkpoint = FolderCheckpoint(folder)
    assert f"already quantized to {bits} bits" in checkpoint.notes[0]
    check_language_tensors(checkpoint)
    FastViT.from_checkpoint(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    original = mx.array(RandomCheckpoint("tiny").read(name, "mlx"))
    packed = mx.quantize(original, group_size=group_size, bits=bits)
    expected = mx.dequantize(*packed, group_size=group_size, bits=bits)
    assert np.array_equal(checkpoint.read(name, "pt"), np.array(expected))
    assert checkpoint.tensors[name].shape == original.shape
    assert not np.array_equal(checkpoint.read(name, "pt"), np.array(original))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quantization": None}, "has no 'quantization'"),
        ({"quantization": {"group_size": 32, "bits": 4}}, "must have groups of 32 with 4 bits"),
        ({"quantization": {"group_size": 64, "bits": 8}}, "must have groups of 64 with 8 bits"),
    ],
)
def test_groups_that_contradict_their_description_are_refused(
    written: Callable[..., Path], described: dict[str, Any], message: str
) -> None:
    folder = written("mlx")
    quantize(folder, 4, 64, **described)
    with pytest.raises(WeightsError, match=message):
        FolderCheckpoint(folder)


def test_mlx_folder_with_torch_axes_is_read_unchanged(written: Callable[..., Path]) -> None:
    folder = written("mlx")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "vision_tower" in name and tensor.ndim in (3, 4):
            tensors[name] = tensor.permute((0, 3, 1, 2) if tensor.ndim == 4 else (2, 0, 1)).contiguous()
    save_file(tensors, folder / "model.safetensors")
    source, checkpoint = RandomCheckpoint("tiny"), FolderCheckpoint(folder)
    for name in source.tensors:
        assert np.array_equal(checkpoint.read(name, "pt").numpy(), source.read(name, "pt")), name


def test_convolutions_that_lie_both_ways_are_refused(written: Callable[..., Path]) -> None:
    folder = written("mlx")
    tensors = load_file(folder / "model.safetensors")
    name = "vision_tower.vision_model.network.0.0.convffn.conv.conv.weight"
    tensors[name] = tensors[name].permute(0, 3, 1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"one order of axes, got .*channels-last"):
        FolderCheckpoint(folder)


def test_mixed_layouts_are_refused(written: Callable[..., Path]) -> None:
    folder = written("hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.vision_model.head.proj"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="mixes tensors of the layouts Hugging Face native and mlx-vlm"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_qwen2"}, "model_type must be 'fast_vlm'"),
        ({"text_config": None}, "text_config must be an object"),
        ({"vision_config": "timm"}, "vision_config must be an object"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be 'gelu'"),
        ({"vision_feature_layer": -2}, "vision_feature_layer must be -1"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy must be 'full'"),
    ],
)
def test_error_when_a_hugging_face_config_is_unsupported(
    written: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FolderCheckpoint(written("hf", lambda config: config.update(change)))


def test_image_size_is_read_from_the_preprocessor(written: Callable[..., Path]) -> None:
    folder = written("hf")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 512}}))
    assert FolderCheckpoint(folder).config.image_size == 512
    for wrong in ({"height": 256, "width": 512}, {"height": {}, "width": 256}, {"height": True}, [256], "256"):
        (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": wrong}))
        with pytest.raises(ConfigError, match="crop_size must be a square's side"):
            FolderCheckpoint(folder)
    (folder / "preprocessor_config.json").unlink()
    assert FolderCheckpoint(folder).config.image_size == 256  # from image_seq_length 16


def test_image_processor_is_read_in_its_nested_form(written: Callable[..., Path]) -> None:
    folder = written("hf")
    processor = {"crop_size": {"height": 512, "width": 512}, "rescale_factor": 1 / 255, "do_center_crop": False}
    nested = {"processor_class": "FastVlmProcessor", "image_processor": processor}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    checkpoint = FolderCheckpoint(folder)
    assert checkpoint.config.image_size == 512  # preprocessor_config.json has 256
    assert "processor_config.json has do_center_crop=false" in checkpoint.notes[0]
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "FastVlmProcessor"}))
    assert FolderCheckpoint(folder).config.image_size == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            r"image_mean must be 0, got \[0.5, 0.5, 0.5\]. FastVLM's encoder takes pixels",
        ),
        ({"image_std": 0.5}, "image_std must be 1"),
        ({"rescale_factor": 1 / 127.5}, "must be scaled by 1/255, got 0.0078"),
        ({"do_rescale": False}, "must be scaled by 1/255, got 1"),
        ({"image_mean": [0.5, 0.5, 0.5], "do_normalize": False}, None),
        ({"image_mean": [0, 0, 0], "image_std": [1.0, 1.0, 1.0]}, None),
    ],
)
def test_pixels_of_another_range_are_refused(
    written: Callable[..., Path], fields: dict[str, Any], message: str | None
) -> None:
    folder = written("hf")
    square = {"size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**square, **fields}))
    if message is None:
        assert FolderCheckpoint(folder).notes == ()
        return
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: .*{message}"):
        FolderCheckpoint(folder)


def test_default_of_llava_says_nothing_about_the_image_size(golden: Path) -> None:
    checkpoint = FolderCheckpoint(golden / "hf_fast_vlm_small")
    assert checkpoint.config.image_size == 1024
    assert "no image size in processor_config.json or preprocessor_config.json" in checkpoint.notes[0]


def test_contradictory_ties_are_decided_by_the_weights(written: Callable[..., Path]) -> None:
    checkpoint = FolderCheckpoint(written("hf", lambda config: config.update(tie_word_embeddings=False)))
    assert checkpoint.config.decoder.tie_word_embeddings
    assert (
        "tie_word_embeddings=False and, in text_config, True, but the checkpoint has no lm_head" in checkpoint.notes[0]
    )


def test_rope_theta_and_eos_of_hugging_face_are_found(written: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        text = config["text_config"]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
        del text["rope_theta"], text["eos_token_id"]

    folder = written("hf", change)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = FolderCheckpoint(folder).config
    assert config.decoder.rope_theta == 5e5
    assert config.eos_token_ids == (7, 9)


def test_error_when_the_vocabulary_exceeds_the_table(write_checkpoint: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000]

    checkpoint = FolderCheckpoint(write_checkpoint(change=cut))
    assert checkpoint.notes == ("config.json has vocab_size=1024, but embed_tokens has 1000 rows: the weights decide",)
    check_language_tensors(checkpoint)


@pytest.mark.parametrize("layout", ["apple", "hf", "mlx"])
def test_heads_in_other_places_and_redundant_ones_are_read(written: Callable[..., Path], layout: str) -> None:
    folder = written(layout)
    tensors = load_file(folder / "model.safetensors")
    table = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": table.clone()}, folder / "model.safetensors")
    redundant = FolderCheckpoint(folder)
    assert redundant.config.decoder.tie_word_embeddings
    check_language_tensors(redundant)
    save_file({**tensors, "lm_head.weight": table + 1}, folder / "model.safetensors")
    untied = FolderCheckpoint(folder)
    assert not untied.config.decoder.tie_word_embeddings
    assert "the weights decide" in untied.notes[0]
    check_language_tensors(untied)


def test_error_when_the_tokenizer_has_another_image_token(written: Callable[..., Path]) -> None:
    folder = written("hf", lambda config: config.update(image_token_index=639))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = {**tokenizer["added_tokens"][-1], "id": 1023, "content": "<image>"}
    tokenizer["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert FolderCheckpoint(folder).notes == (
        "config.json has image_token_index=639, but tokenizer.json has <image> at 1023: the tokenizer decides",
    )


HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_that_loses_texts_is_replaced(written: Callable[..., Path], where: str) -> None:
    folder = written("hf")
    own = FolderCheckpoint(folder).tokenizer_files()
    if where.endswith(".json"):
        settings = {**json.loads((folder / where).read_text()), "chat_template": HF_TEMPLATE}
        (folder / where).write_text(json.dumps(settings))
    else:
        (folder / where).write_text(HF_TEMPLATE)
    files = FolderCheckpoint(folder).tokenizer_files()
    template = json.loads(files[where])["chat_template"] if where.endswith(".json") else files[where].decode()
    assert template == json.loads(own["tokenizer_config.json"])["chat_template"]


def test_error_when_the_encoder_is_missing_or_exported(written: Callable[..., Path]) -> None:
    folder = written("mlx")
    tensors = load_file(folder / "model.safetensors")
    language = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    save_file(language, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="a decoder without a vision encoder"):
        FolderCheckpoint(folder)
    exported = {"multi_modal_projector.linear_0.weight": torch.zeros(1)}
    save_file({**language, **exported}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="exported model folder. Use it with `fastvlm generate`"):
        FolderCheckpoint(folder)


OLDER_HF = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("hf", OLDER_HF),
        ("hf", (("model.language_model.", "model."),)),
        ("mlx", (("language_model.model.", "language_model.model.model."),)),
        ("mlx", (("mm_projector.", "mm_projector.layers."),)),
        (
            "mlx",
            (
                ("mm_projector.0", "multi_modal_projector.linear_1"),
                ("mm_projector.2", "multi_modal_projector.linear_2"),
            ),
        ),
    ],
)
def test_names_of_older_versions_are_read(
    written: Callable[..., Path], layout: str, changes: tuple[tuple[str, str], ...]
) -> None:
    folder, names = written(layout), ("model.mm_projector.2.weight", "model.layers.0.mlp.up_proj.weight")
    before = FolderCheckpoint(folder)
    expected = {name: before.read(name, "pt") for name in names}
    tensors = load_file(folder / "model.safetensors")
    for today, older in changes:
        tensors = {older + n.removeprefix(today) if n.startswith(today) else n: t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = FolderCheckpoint(folder)
    assert checkpoint.tensors == before.tensors
    for name in names:
        assert torch.equal(checkpoint.read(name, "pt"), expected[name])


@pytest.mark.parametrize("projector", ["mm_projector.layers.", "mm_projector."])
def test_quantized_projector_is_expanded_under_each_name(written: Callable[..., Path], projector: str) -> None:
    folder = written("mlx", lambda config: config.update(quantization={"group_size": 64, "bits": 4}))
    tensors = mx.load(str(folder / "model.safetensors"))
    weight = tensors.pop("mm_projector.2.weight")
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=4)
    tensors = {name.replace("mm_projector.", projector): tensor for name, tensor in tensors.items()}
    for part, tensor in (("weight", packed), ("scales", scales), ("biases", biases)):
        tensors[f"{projector}2.{part}"] = tensor
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    found = FolderCheckpoint(folder).read("model.mm_projector.2.weight", "mlx")
    expected = mx.dequantize(packed, scales, biases, group_size=64, bits=4)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6)
