"""Model folders: complete ones open, others are refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.errors import ConfigError, ModelFolderError, WeightsError
from fastvlm.models.files import sample_sha256
from fastvlm.runtime.folder import NO_MANIFEST_NOTE, UNTRAINED_NOTE, open_folder

Write = Callable[..., Path]


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "fastvlm.json").read_text())
    change(manifest)
    (folder / "fastvlm.json").write_text(json.dumps(manifest))


def test_folder_opens_when_it_is_complete(write_folder: Write) -> None:
    path = write_folder()
    folder = open_folder(str(path))
    assert (folder.path, folder.package) == (path, path / "fastvithd.mlpackage")
    assert folder.config.image_token_index == 1023
    assert (folder.trained, folder.notes) == (True, ())
    assert "language_model.model.norm.weight" in folder.weights()


def test_home_is_understood_in_a_path(write_folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_folder()
    monkeypatch.setenv("HOME", str(path.parent))
    assert open_folder(f"~/{path.name}").path == path


def test_note_is_made_when_there_is_no_manifest(write_folder: Write) -> None:
    folder = open_folder(write_folder(manifest=None))
    assert (folder.trained, folder.notes) == (True, (NO_MANIFEST_NOTE,))


def test_folder_with_only_a_core_ai_asset_says_what_runs_it(write_folder: Write) -> None:
    folder = write_folder(manifest=None)
    (folder / "fastvithd.mlpackage").rename(folder / "fastvithd.aimodel")
    with pytest.raises(ModelFolderError, match=r"apps run on macOS 27.* format='both' to run it here") as raised:
        open_folder(folder)
    assert raised.value.arguments == ("format",)


@pytest.mark.parametrize(
    ("manifest", "trained", "notes"),
    [
        ({"trained": False, "notes": []}, False, (UNTRAINED_NOTE,)),
        ({"trained": False, "notes": ["random weights"]}, False, ("random weights",)),
        ({"trained": True, "notes": ["a", 3, "b"]}, True, ("a", "b")),
        ({"trained": True, "notes": "no list"}, True, ()),
    ],
)
def test_manifest_says_if_the_weights_are_trained(
    write_folder: Write, manifest: dict, trained: bool, notes: tuple[str, ...]
) -> None:
    folder = open_folder(write_folder(manifest=manifest))
    assert (folder.trained, folder.notes) == (trained, notes)


def test_eos_is_read_from_generation_config_too(write_folder: Write) -> None:
    path = write_folder(eos_token_id=1022)
    (path / "generation_config.json").write_text('{"eos_token_id": [1022, 1020]}')
    assert open_folder(path).config.eos_token_ids == (1022, 1020)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "fastvithd.mlpackage/Manifest.json"])
def test_file_is_named_when_it_is_missing(write_folder: Write, name: str) -> None:
    path = write_folder()
    (path / name).unlink()
    with pytest.raises(ModelFolderError, match=f"does not match its manifest: {name} is missing"):
        open_folder(path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_file_is_named_when_its_size_differs(write_folder: Write, name: str) -> None:
    path = write_folder()
    size = (path / name).stat().st_size
    with (path / name).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ModelFolderError, match=f"{name} has {size + 1} bytes instead of {size}"):
        open_folder(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), r"the format must be 1 \(got 2\)"),
        (lambda m: m.pop("format"), r"\(got None\)"),
        (lambda m: m.update(files=None), "lists no files"),
        (lambda m: m["files"].update({"../secret": {"bytes": 1}}), "'../secret' is outside the folder"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1}}), "'/etc/passwd' is outside"),
        (lambda m: m["files"].update({"x" * 5000: {"bytes": 1}}), "x{200} is missing. Copy it again"),
        (lambda m: m["files"].update({"a\0b": {"bytes": 1}}), "is missing. Copy it again"),
        (lambda m: m["files"].update({"config.json": None}), "config.json has .* bytes instead of None"),
        (lambda m: m["files"].update({f"f{n}": {} for n in range(9)}), "f3 is missing and 5 more. Copy it again"),
    ],
)
def test_folder_is_refused_when_its_manifest_is_wrong(
    write_folder: Write, change: Callable[[dict], object], message: str
) -> None:
    path = write_folder()
    change_manifest(path, change)
    with pytest.raises(ModelFolderError, match=message):
        open_folder(path)


def test_folder_with_weights_of_another_export_is_refused(write_folder: Write) -> None:
    path = write_folder()
    shard(path)
    (path / "model-00001-of-00002.safetensors").rename(path / "model.safetensors")
    with pytest.raises(
        ModelFolderError, match=r"model\.safetensors\.index\.json is from another export\. Copy it again"
    ):
        open_folder(path)


def test_folder_is_refused_when_its_manifest_is_malformed(write_folder: Write) -> None:
    path = write_folder()
    (path / "fastvlm.json").write_text("[]")
    with pytest.raises(ModelFolderError, match="must be a JSON object"):
        open_folder(path)


def test_error_when_the_folder_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(ModelFolderError, match=r"is not a model folder: it has no config\.json"):
        open_folder(tmp_path)


def test_checkpoint_is_not_a_model_folder(write_checkpoint: Write) -> None:
    with pytest.raises(ModelFolderError, match=r"it has no fastvithd\.mlpackage\. .*`fastvlm export`"):
        open_folder(write_checkpoint())


def test_config_error_when_config_is_malformed(write_folder: Write) -> None:
    path = write_folder(manifest=None)
    (path / "config.json").write_text('{"model_type": "llava_qwen2"}')
    with pytest.raises(ConfigError):
        open_folder(path)


def shard(path: Path) -> list[str]:
    """Splits the weights over two files with an index; returns the tensors' names."""
    weights = mx.load(str(path / "model.safetensors"))
    names, weight_map = sorted(weights), {}
    for k in range(2):
        file = f"model-{k + 1:05}-of-00002.safetensors"
        mx.save_safetensors(str(path / file), {name: weights[name] for name in names[k::2]})
        weight_map.update(dict.fromkeys(names[k::2], file))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_weights_are_read_from_all_shards(write_folder: Write) -> None:
    path = write_folder(manifest=None)
    whole = {name: mx.array(array) for name, array in open_folder(path).weights().items()}
    mx.eval(whole)
    names = shard(path)
    weights = open_folder(path).weights()
    assert sorted(weights) == names
    assert all(mx.array_equal(weights[name], whole[name]) for name in names)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "must map tensor names to file names"),
        ({}, "'weight_map' is empty"),
        ({"a": 3}, "must map tensor names to file names"),
        ({"a": "../model.safetensors"}, "names a file outside the folder"),
        (["a"], "must map tensor names to file names"),
    ],
)
def test_folder_error_when_the_index_is_wrong(write_folder: Write, weight_map: object, message: str) -> None:
    path = write_folder(manifest=None)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFolderError, match=message):
        open_folder(path).weights()


def test_folder_error_when_there_are_no_weights(write_folder: Write) -> None:
    path = write_folder(manifest=None)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="has no decoder"):
        open_folder(path).weights()


def test_weights_error_when_a_file_is_cut_short(write_folder: Write) -> None:
    path = write_folder(manifest=None)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        open_folder(path).weights()


def test_parts_of_two_exports_of_equal_sizes_are_refused(write_folder: Write) -> None:
    """Two checkpoints that were exported with one recipe have files of the same sizes."""
    path = write_folder()
    manifest = json.loads((path / "fastvlm.json").read_text())
    manifest["files"]["model.safetensors"]["sample_sha256"] = sample_sha256(path / "model.safetensors")
    (path / "fastvlm.json").write_text(json.dumps(manifest))
    open_folder(path, verify_hashes=True)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-4:] = bytes(4)
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        ModelFolderError, match=r"model\.safetensors is from another export, or damaged\. Copy it again"
    ):
        open_folder(path)


def test_every_byte_is_compared_with_verify_hashes(write_folder: Write) -> None:
    path = write_folder()
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    open_folder(path)  # the manifest of this fixture holds no samples
    with pytest.raises(ModelFolderError, match=r"model\.safetensors has another sha256"):
        open_folder(path, verify_hashes=True)
    (path / "fastvlm.json").unlink()
    with pytest.raises(ModelFolderError, match="no fastvlm.json to verify its files with"):
        open_folder(path, verify_hashes=True)


def test_sample_sees_size_and_both_ends_of_a_file(tmp_path: Path) -> None:
    seen = set()
    for content in (b"", b"a", bytes(10**6), bytes(10**6 + 1), b"x" + bytes(10**6 - 1), bytes(10**6 - 1) + b"x"):
        (tmp_path / "f").write_bytes(content)
        seen.add(sample_sha256(tmp_path / "f"))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tiny", "Run `fastvlm export tiny -o model`"),
        ("random:0.5b", "Run `fastvlm export random:0.5b -o model`"),
        ("nobody/FastVLM-0.5B", "Fetch it with `fastvlm download nobody/FastVLM-0.5B`"),
        ("0.5b-stage3", "Fetch it with `fastvlm download 0.5b-stage3`"),
        ("gone", "Make a model folder with `fastvlm export`"),
    ],
)
def test_error_has_the_command_that_makes_a_folder(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError) as raised:
        open_folder(name)
    assert hint in str(raised.value)
