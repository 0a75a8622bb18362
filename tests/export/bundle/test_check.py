"""Each fault of a bundle is seen and named: one key, type, name or shape wrong at a time."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.export.bundle.check import check_bundle
from fastvlm.models._mlx import mx
from fastvlm.models.errors import ModelFolderError, UsageError
from fastvlm.models.mlprogram import model_class
from fastvlm.models.safetensors_files import write_safetensors

TOWER = "vision_tower.vision_model."


Change = Callable[[Path], None]


def test_whole_bundles_pass(bundles: dict[str, Path]) -> None:
    for target, folder in bundles.items():
        assert check_bundle(folder, target).faults == ()


def test_bundles_are_judged_for_their_own_client(bundles: dict[str, Path]) -> None:
    assert not check_bundle(bundles["apple-app"], "mlx-vlm").passed
    assert not check_bundle(bundles["mlx-vlm"], "apple-app").passed


def json_value(file: str, key: str, value: Any = None) -> Change:
    """Sets a dotted key of a JSON file; without a value takes it away."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        *path, last = key.split(".")
        place = content
        for name in path:
            place = place[name]
        if value is None:
            del place[last]
        else:
            place[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def config(key: str, value: Any = None) -> Change:
    return json_value("config.json", key, value)


def pixels(key: str, value: Any = None) -> Change:
    return json_value("preprocessor_config.json", key, value)


def settings(key: str, value: Any = None) -> Change:
    return json_value("tokenizer_config.json", key, value)


def tensors(edit: Callable[[dict[str, mx.array]], object]) -> Change:
    def change(folder: Path) -> None:
        found = mx.load(str(folder / "model.safetensors"))
        edit(found)
        mx.eval(found)
        write_safetensors(folder / "model.safetensors", found, {})

    return change


def renamed(old: str, new: str) -> Change:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def replaced(name: str, edit: Callable[[mx.array], mx.array]) -> Change:
    return tensors(lambda found: found.update({name: edit(found[name])}))


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        edit(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def without_token(token: str) -> Change:
    def edit(content: dict[str, Any]) -> None:
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]

    return tokenizer(edit)


def past_the_table(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 5000, "content": "<|extra|>", "special": True})


def package(edit: Callable[[Any], object]) -> Change:
    """Edits the model description and its program."""

    def change(folder: Path) -> None:
        (file,) = (folder / "fastvithd.mlpackage").rglob("model.mlmodel")
        model = model_class()()
        model.ParseFromString(file.read_bytes())
        edit(model)
        file.write_bytes(model.SerializeToString())

    return change


def float16_input(model: Any) -> None:
    model.mlProgram.functions["main"].inputs[0].type.tensorType.dataType = 10  # MIL's FLOAT16


def other_size(model: Any) -> None:
    model.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[2].constant.size = 320


def renamed_output(model: Any) -> None:
    model.description.output[0].name = "features"
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    name = block.outputs[0]
    block.outputs[0] = "features"
    for operation in block.operations:
        for output in operation.outputs:
            if output.name == name:
                output.name = "features"


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


PROJECTOR = "multi_modal_projector.linear_0.weight"


NORM = "language_model.model.norm.weight"


APPLE = [
    (config("model_type", "qwen2"), "'model_type' must be 'llava_qwen2' (got 'qwen2')"),
    (config("vocab_size"), "'vocab_size' is missing (must be a positive integer)"),
    (config("vocab_size", "1024"), "'vocab_size' must be a positive integer (got '1024')"),
    (config("hidden_size", 128.5), "'hidden_size' must be a positive integer (got 128.5)"),
    (config("hidden_size", 256), "embed_tokens.scales must have the shape"),
    (config("num_attention_heads", True), "'num_attention_heads' must be a positive integer (got True)"),
    (config("num_key_value_heads", 4), "k_proj.bias must have the shape [128] (got [64])"),
    (config("num_hidden_layers", 4), "tensors missing: language_model.model.layers.3."),
    (config("intermediate_size", 512), "must have the shape"),
    (config("mm_hidden_size", 3072), "'mm_hidden_size' must be 512 (got 3072)"),
    (config("image_token_index", -200), "'image_token_index' must be a positive integer (got -200)"),
    (config("image_token_index", 7), "must be the id of <image> in tokenizer.json, 1023 (got 7)"),
    (config("rms_norm_eps", "1e-6"), "'rms_norm_eps' must be a number (got '1e-6')"),
    (config("rope_scaling", {"type": "linear"}), "'rope_scaling' must be absent"),
    (config("tie_word_embeddings", "yes"), "'tie_word_embeddings' must be true or false"),
    (config("tie_word_embeddings", False), "tensors missing: language_model.lm_head.weight"),
    (config("quantization"), "'quantization' is missing"),
    (config("quantization.bits", 4), "must have the shape"),
    (config("quantization.group_size", "64"), "'quantization.group_size' must be a positive integer"),
    (config("eos_token_id", 3), "'eos_token' must be in eos_token_id, [3] (got 1022)"),
    (pixels("size.shortest_edge", 1024), "'size.shortest_edge' must be 256 (got 1024)"),
    (pixels("size", 256), "'size.shortest_edge' is missing"),
    (pixels("crop_size.width"), "'crop_size.width' is missing"),
    (pixels("crop_size.height", 128), "'crop_size.height' must be 256 (got 128)"),
    (pixels("image_mean", [0.48, 0.45, 0.4]), "'image_mean' must be [0, 0, 0]"),
    (pixels("image_std", [1.0, 1.0]), "'image_std' must be a list of three numbers"),
    (pixels("processor_class", "FastVLMProcessor"), "'processor_class' must be 'LlavaProcessor'"),
    (json_value("processor_config.json", "patch_size", 14), "'patch_size' must be 64 (got 14)"),
    (tensors(lambda found: found.pop(NORM)), f"1 tensors missing: {NORM}"),
    (tensors(lambda found: found.update(extra=mx.zeros(3))), "1 tensors unknown to the client: extra"),
    (renamed(PROJECTOR, "mm_projector.0.weight"), "unknown to the client: mm_projector.0.weight"),
    (replaced(PROJECTOR, lambda t: t.T), "linear_0.weight must have the shape [128, 512] (got [512, 128])"),
    (replaced(NORM, lambda t: t.view(mx.uint16).astype(mx.uint32)), "norm.weight must have the type BF16 or F16"),
    (truncated, "model.safetensors"),
    (settings("tokenizer_class"), "'tokenizer_class' is missing"),
    (settings("eos_token", "</s>"), "'eos_token' must be an added token of tokenizer.json (got '</s>')"),
    (without_token("<|im_end|>"), "<|im_end|> must be an added token"),
    (without_token("<image>"), "must be the id of <image>"),
    (tokenizer(past_the_table), "the id of <|extra|> must be less than 1024, the vocab_size (got 5000)"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json does not exist"),
    (lambda folder: shutil.rmtree(folder / "fastvithd.mlpackage"), "fastvithd.mlpackage"),
    (lambda folder: (folder / "fastvithd.mlpackage").rename(folder / "encoder.mlpackage"), "fastvithd.mlpackage"),
    (package(float16_input), "fastvithd.mlpackage"),
    (package(other_size), "the input must be images fp32 [1, 3, 256, 256] (got images"),
    (package(renamed_output), "the output must be image_features fp32 [1, 16, 512] (got features"),
]  # fmt: skip


MLX = [
    (config("image_token_index", 1023), "'image_token_index' must be -200 (got 1023)"),
    (config("eos_token_id", [1022, 1023]), "'eos_token_id' must be an integer (got [1022, 1023])"),
    (config("mm_projector_type", "linear"), "'mm_projector_type' must be 'mlp2x_gelu'"),
    (config("tokenizer_model_max_length"), "'tokenizer_model_max_length' is missing"),
    (config("tokenizer_padding_side"), "'tokenizer_padding_side' is missing"),
    (config("vision_config"), "'vision_config' is missing (must be an object)"),
    (config("vision_config.cls_ratio", 1.0), "'vision_config.cls_ratio' must be 2.0 (got 1.0)"),
    (config("vision_config.layers", [1, 2, 2, 1]), "'vision_config.layers' must be a list of five sizes"),
    (config("vision_config.layers", [1, 2, 3, 1, 1]), "tensors missing: vision_tower.vision_model.network.4.2."),
    (config("vision_config.embed_dims", [32, 32, 64, 128, 256]), "must have the shape"),
    (config("vision_config.embed_dims", []), "'vision_config.embed_dims' must be a list of five sizes (got [])"),
    (config("vision_config.layers", [1, 2, 10**9, 1, 1]), "must be a list of five sizes"),
    (config("vision_config.mlp_ratios", [4, 4, 4, 4, 3]), "must have the shape"),
    (config("vision_config.pos_embs_shapes", [None] * 5), "'vision_config.pos_embs_shapes' must be"),
    (config("vision_config.token_mixers", ["repmixer"] * 5), "'vision_config.token_mixers' must be"),
    (config("vision_config.projection_dim", 512), "head.proj must have the shape [512, 512] (got [512, 768])"),
    (config("vision_config.image_size", 1024), "'size.shortest_edge' must be 1024 (got 256)"),
    (config("vision_config.layer_scale_init_value", "small"), "must be a number (got 'small')"),
    (pixels("processor_class", "LlavaProcessor"), "'processor_class' must be 'FastVLMProcessor'"),
    (settings("chat_template"), "'chat_template' is missing"),
    (settings("chat_template", "{% for message in messages %}{{ message['content'] }}{% endfor %}"), "parts of type"),
    (settings("chat_template", "{% for 'image' <image>"), "'chat_template' is not a valid template"),
    (tensors(lambda found: found.pop(f"{TOWER}head.proj")), f"1 tensors missing: {TOWER}head.proj"),
    (
        renamed(f"{TOWER}patch_embed.blocks.0.reparam_conv.bias", f"{TOWER}patch_embed.0.reparam_conv.bias"),
        f"unknown to the client: {TOWER}patch_embed.0.reparam_conv.bias",
    ),
    (
        replaced(f"{TOWER}patch_embed.blocks.1.reparam_conv.weight", lambda t: t.transpose(0, 3, 1, 2)),
        "must have the shape [16, 3, 3, 1] (got [16, 1, 3, 3])",
    ),
    (
        replaced(f"{TOWER}network.0.0.layer_scale", lambda t: t.transpose(2, 0, 1)),
        "layer_scale must have the shape [1, 1, 16] (got [16, 1, 1])",
    ),
    (renamed("mm_projector.2.bias", "multi_modal_projector.linear_2.bias"), "missing: mm_projector.2.bias"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        *(("apple-app", *case) for case in APPLE),
        *(("mlx-swift-lm", *case) for case in MLX),
        ("mlx-vlm", *MLX[0]),
    ],
)
def test_mutated_bundles_are_rejected_by_name(
    bundles: dict[str, Path], tmp_path: Path, target: str, change: Change, message: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles[target], folder)
    change(folder)
    found = check_bundle(folder, target)
    assert not found.passed
    assert message in "\n".join(found.faults)


def test_an_empty_folder_lacks_every_file(tmp_path: Path) -> None:
    found = check_bundle(tmp_path, "apple-app")
    assert len(found.faults) == 3


def test_files_that_the_clients_can_do_without_may_be_absent(bundles: dict[str, Path], tmp_path: Path) -> None:
    for target, folder in bundles.items():
        copy = tmp_path / target
        shutil.copytree(folder, copy)
        (copy / "processor_config.json").unlink()
        assert check_bundle(copy, target).passed


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        check_bundle(tmp_path / "absent", "mlx-vlm")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ModelFolderError, match=r"bundle.zip is a zip file. Unzip it first"):
        check_bundle(tmp_path / "bundle.zip", "mlx-vlm")
    with pytest.raises(UsageError, match=r"client must be one of apple-app, mlx-swift-lm, mlx-vlm \(got 'android'\)"):
        check_bundle(tmp_path, "android")
