"""Bundles as they are written, also from untrusted folders: files, places, and refusals before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm.export.bundle import write
from fastvlm.export.bundle.check import check_bundle
from fastvlm.export.bundle.contracts import APPLE_APP, CONTRACTS, MLX_SWIFT_LM, MLX_VLM
from fastvlm.export.bundle.write import LICENCE_NOTE, bundle, check_requirements
from fastvlm.models.errors import ConfigError, ModelFolderError, UsageError, VerificationError
from fastvlm.models.files import read_json_object, sha256


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_app_bundle_holds_what_the_app_reads(bundles: dict[str, Path], folders: dict[str, Path]) -> None:
    names = {path.name for path in bundles["apple-app"].iterdir()}
    assert names == {"config.json", "fastvithd.mlpackage", "fastvlm-bundle.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"}  # fmt: skip
    weights = "model.safetensors"
    assert (bundles["apple-app"] / weights).read_bytes() == (folders["coreml"] / weights).read_bytes()


def test_manifest_lists_every_file_with_its_hash(bundles: dict[str, Path]) -> None:
    for target, folder in bundles.items():
        manifest = read_json_object(folder / "fastvlm-bundle.json")
        assert manifest["target"] == target
        assert manifest["files"].keys() == contents(folder).keys() - {"fastvlm-bundle.json"}
        assert manifest["notes"] == ["random weights: the text means nothing"]


def test_two_bundles_are_equal(bundles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    again = fastvlm.bundle(folders["coreml"], "apple-app", tmp_path / "again")
    assert contents(again.path) == contents(bundles["apple-app"])
    assert again.total_bytes == sum(map(len, contents(again.path).values())) - len(
        (again.path / "fastvlm-bundle.json").read_bytes()
    )


def test_core_ai_asset_is_left_out_and_does_not_replace_a_package(folders: dict[str, Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folders["coreml"], both)
    (both / "fastvithd.aimodel").mkdir()
    manifest = read_json_object(both / "fastvlm.json")
    manifest["notes"].append("fastvithd.aimodel is experimental: no client loads it")
    (both / "fastvlm.json").write_text(json.dumps(manifest))
    found = bundle(both, "apple-app", tmp_path / "bundle")
    assert not (found.path / "fastvithd.aimodel").exists() and not any("aimodel" in note for note in found.notes)
    shutil.rmtree(both / "fastvithd.mlpackage")
    with pytest.raises(UsageError, match="runs a Core ML package. Export again with format='coreml' or 'both'"):
        check_requirements(both, CONTRACTS["apple-app"])


@pytest.mark.parametrize(
    ("quantization", "fault"),
    [
        ({"group_size": 64, "bits": 5}, "it has 5 bits"),
        ({"group_size": 64, "bits": 8, "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 4}}, "differ in bits"),
        ({"group_size": 64, "bits": 8, "lm_head": False}, "differ in bits"),
        ({"group_size": 64, "bits": 3}, None),
        ({"group_size": 64, "bits": 8, "mode": "affine"}, None),
        (None, None),
    ],
)
def test_decoders_that_the_app_cannot_load_are_refused(
    folders: dict[str, Path], tmp_path: Path, quantization: dict[str, object] | None, fault: str | None
) -> None:
    folder = shutil.copytree(folders["coreml"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": quantization}))
    if fault is None:
        check_requirements(folder, CONTRACTS["apple-app"])
    else:
        with pytest.raises(UsageError, match=f"{fault}. Export again with decoder_bits 4, 6 or 8"):
            bundle(folder, "apple-app", tmp_path / "b")
    faults = check_bundle(folder, "apple-app").faults
    assert any("cannot load the decoder" in text for text in faults) == (fault is not None)
    assert not list(MLX_SWIFT_LM.decoder_faults({"quantization": quantization}))


@pytest.mark.parametrize(
    ("encoder", "client", "contract", "message"),
    [
        ("mlx", "apple-app", replace(APPLE_APP, channels=512), "a Core ML package. Export again with encoder='coreml'"),
        ("coreml", "mlx-vlm", MLX_VLM, "runs MLX weights. Export again with encoder='mlx'"),
        ("coreml", "apple-app", replace(APPLE_APP, channels=512), "Export again with image_size=1024"),
        (
            "coreml",
            "apple-app",
            APPLE_APP,
            r"needs the 3072 channels of FastViTHD \(got 512\)\.$",
        ),  # at no other size either
        (
            "coreml",
            "apple-app",
            replace(APPLE_APP, image_size=256),
            r"needs the 3072 channels of FastViTHD \(got 512\)",
        ),
        ("mlx", "mlx-vlm", MLX_VLM, "runs only FastViTHD, with depths 2-12-24-4-2"),
    ],
)
def test_impossible_requests_are_refused_before_any_write(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: str,
    client: str,
    contract: object,
    message: str,
) -> None:
    monkeypatch.setitem(CONTRACTS, client, contract)
    with pytest.raises(UsageError, match=message):
        bundle(folders[encoder], client, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io": "float16"}, "again with io='float32'.$"),
        ({"io": "image"}, "again with io='float32'.$"),
        ({"with_projector": True}, "again with with_projector=False.$"),
    ],
)
def test_packages_with_another_interface_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Only the border counts: the network inside is left out."""
    import torch

    from fastvlm.export.bundle.write import check_requirements
    from fastvlm.export.recipe import PackageInterface
    from fastvlm.export.write_encoder import convert_encoder

    interface = PackageInterface(**options)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 512, 1, 64), torch.nn.Flatten(2))
    (folder := tmp_path / "model").mkdir()
    convert_encoder(
        network.eval(), 256, {}, folder / "fastvithd.mlpackage", metadata={}, on_stage=print, interface=interface
    )
    (folder / "config.json").write_text(json.dumps({"mm_hidden_size": 512}))
    with pytest.raises(UsageError, match=message):
        check_requirements(folder, replace(APPLE_APP, image_size=256, channels=512))


def test_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["mlx"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="does not match its manifest in tokenizer.json"):
        bundle(tmp_path / "model", "mlx-vlm", tmp_path / "b")
    (tmp_path / "model" / "fastvlm.json").unlink()  # a folder of somebody else's, without a manifest
    with pytest.raises(ModelFolderError, match="'added_tokens'"):
        bundle(tmp_path / "model", "mlx-vlm", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_result_that_breaks_the_contract_does_not_appear(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "bundle_faults", lambda folder, contract: iter(["a fault"]))
    with pytest.raises(VerificationError, match="no bundle for mlx-vlm was written: a fault"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_licence_files_come_along_and_are_spoken_of(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(folders["mlx"], source)
    (source / "LICENSE_MODEL").write_text("for research")
    manifest = read_json_object(source / "fastvlm.json")
    manifest["files"]["LICENSE_MODEL"] = {"bytes": 12, "sha256": sha256(source / "LICENSE_MODEL")}
    (source / "fastvlm.json").write_text(json.dumps({**manifest, "trained": True, "notes": []}))
    result = bundle(source, "mlx-vlm", tmp_path / "b")
    assert (result.path / "LICENSE_MODEL").read_text() == "for research"
    assert result.notes == (LICENCE_NOTE,)


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
