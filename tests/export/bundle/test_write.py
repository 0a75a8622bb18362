"""Bundles as they are written: where they go, what they leave alone, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import fastvlm
from fastvlm.export.bundle import memory, write
from fastvlm.export.bundle.check import check_bundle
from fastvlm.export.bundle.contracts import APPLE_APP, CONTRACTS, MLX_SWIFT_LM, MLX_VLM, Contract
from fastvlm.export.bundle.memory import PHONES, Estimate, estimate
from fastvlm.export.bundle.place import MAX_OTHERS, publish_with_others
from fastvlm.export.bundle.swift_packages import CHOSEN, RESOLVED, VERSIONS_NOTE
from fastvlm.export.bundle.write import LICENCE_NOTE, bundle, check_requirements
from fastvlm.models.errors import ModelFolderError, OutputError, UsageError, VerificationError
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


def test_two_bundles_are_equal(bundles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    again = fastvlm.bundle(folders["coreml"], "apple-app", tmp_path / "again")
    assert contents(again.path) == contents(bundles["apple-app"])
    assert again.total_bytes == sum(map(len, contents(again.path).values())) - len(
        (again.path / "fastvlm-bundle.json").read_bytes()
    )


def test_zips_are_equal_and_hold_the_bundle(bundles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    first = bundle(folders["mlx"], "mlx-vlm", tmp_path / "first", zipped=True).path
    second = bundle(folders["mlx"], "mlx-vlm", tmp_path / "second.zip", zipped=True).path
    assert first == tmp_path / "first.zip"
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == contents(bundles["mlx-vlm"])
        assert archive.namelist() == sorted(archive.namelist())
    bundle(folders["mlx"], "mlx-vlm", first, zipped=True)  # over an earlier one
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.zip", "second.zip"]


def test_zip_that_is_no_bundle_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.jpg", b"")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="exists and is not the zip of a bundle"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "photos.zip", zipped=True)
    assert contents(tmp_path) == before


def test_app_checkout_gets_the_model_in_its_place(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "app" / "FastVLM" / "model"
    model.mkdir(parents=True)
    (model.parent / "FastVLM.swift").write_text("// Swift")
    (model / "README.txt").write_text("put models here")
    (model / "more").mkdir()
    (model / "more" / "link").symlink_to("../README.txt")
    (model / "empty").mkdir()
    os.chmod(model / "README.txt", 0o640)  # noqa: PTH101
    before = (model / "README.txt").stat()
    assert bundle(folders["coreml"], "apple-app", tmp_path).path == model
    assert check_bundle(model, "apple-app").passed
    after = (model / "README.txt").stat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert (model / "more" / "link").readlink() == Path("../README.txt")
    assert (model / "empty").is_dir()
    bundle(folders["coreml"], "apple-app", tmp_path / "app")  # again, over the earlier one
    assert (model / "README.txt").read_text() == "put models here"
    assert sorted(path.name for path in model.parent.iterdir()) == ["FastVLM.swift", "model"]


def checkout(root: Path) -> Path:
    """The app's own folder, in a checkout of ml-fastvlm."""
    (root / "app" / "FastVLM").mkdir(parents=True)
    (root / "app" / "FastVLM" / "FastVLM.swift").write_text("// Swift")
    (root / "app" / "FastVLM.xcodeproj").mkdir()
    urls = "".join(f'repositoryURL = "{pin.location}";' for pin in CHOSEN)
    (root / "app" / "FastVLM.xcodeproj" / "project.pbxproj").write_text(urls)
    return root / "app" / "FastVLM"


def test_app_folder_holds_nothing_unfinished(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a synchronized group: Xcode takes what appears in it for a part of the project."""
    synchronized, seen = checkout(tmp_path), []
    write_files = write.write_files

    def watched(source: Path, written: Path, contract: Contract) -> None:
        seen.append(written.parent)
        assert [path.name for path in synchronized.iterdir() if path.name.startswith(".")] == []
        write_files(source, written, contract)

    monkeypatch.setattr(write, "write_files", watched)
    abandoned = tmp_path / "app" / ".model.partial-999999999"
    abandoned.mkdir()
    for _ in range(2):
        bundle(folders["coreml"], "apple-app", tmp_path)
    assert seen == [tmp_path / "app"] * 2
    assert check_bundle(synchronized / "model", "apple-app").passed
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == ["FastVLM", "FastVLM.xcodeproj"]


def test_app_bundle_says_what_it_builds_with(folders: dict[str, Path], tmp_path: Path) -> None:
    checkout(tmp_path / "clone")
    result = bundle(folders["coreml"], "apple-app", tmp_path / "clone")
    assert "Package.resolved pins" in result.notes[-1]
    assert (tmp_path / "clone" / "app" / "FastVLM.xcodeproj" / RESOLVED).is_file()
    assert "exists and was not changed" in bundle(folders["coreml"], "apple-app", tmp_path / "clone").notes[-1]
    assert bundle(folders["coreml"], "apple-app", tmp_path / "elsewhere").notes[-1] == VERSIONS_NOTE
    assert VERSIONS_NOTE not in bundle(folders["mlx"], "mlx-swift-lm", tmp_path / "other").notes


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


def test_files_of_an_earlier_bundle_that_are_no_longer_needed_go(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle(folders["coreml"], "apple-app", tmp_path / "b")
    (tmp_path / "b" / "mine.txt").write_text("kept")
    bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    assert not (tmp_path / "b" / "fastvithd.mlpackage").exists()
    assert check_bundle(tmp_path / "b", "mlx-vlm").passed
    assert (tmp_path / "b" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["config.json", "fastvithd.mlpackage/Manifest.json"])
def test_files_of_others_are_never_replaced(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "b" / name).parent.mkdir(parents=True)
    (tmp_path / "b" / name).write_text("somebody else's")
    with pytest.raises(OutputError, match="is not from an earlier bundle and is in the way"):
        bundle(folders["coreml"], "apple-app", tmp_path / "b")
    assert contents(tmp_path) == {f"b/{name}": b"somebody else's"}


def test_bundled_files_that_were_changed_since_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="config.json was changed after it was bundled"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_text() == "{}"


def test_folder_of_something_else_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    for index in range(MAX_OTHERS + 1):
        (tmp_path / f"{index}.txt").write_text("")
    with pytest.raises(OutputError, match="Choose a new folder inside it"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path)
    assert len(list(tmp_path.iterdir())) == MAX_OTHERS + 1


def test_damaged_bundle_manifest_is_no_licence_to_replace(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "fastvlm-bundle.json").write_text('{"files": {"../../etc/passwd": {"sha256": "0"}}}')
    with pytest.raises(OutputError, match="is damaged"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path)


def test_file_that_turns_up_meanwhile_stops_the_bundle(tmp_path: Path) -> None:
    (partial := tmp_path / "partial").mkdir()
    (partial / "config.json").write_text("new")
    (folder := tmp_path / "b").mkdir()
    (folder / "config.json").write_text("somebody else's")
    with pytest.raises(OutputError, match="in the way"):
        publish_with_others(partial, folder)
    assert (folder / "config.json").read_text() == "somebody else's"


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
def test_impossible_requests_are_refused_before_anything_is_written(
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io": "float16"}, "again with io='float32'.$"),
        ({"io": "image"}, "again with io='float32'.$"),
        ({"with_projector": True}, "again with with_projector=False.$"),
    ],
)
def test_packages_with_another_border_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Only the border counts: the network inside is left out."""
    import torch

    from fastvlm.export.bundle.write import check_requirements
    from fastvlm.export.coreml import convert_encoder
    from fastvlm.export.recipe import PackageInterface

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


def test_memory_counts_every_part(folders: dict[str, Path]) -> None:
    found = estimate(folders["mlx"], CONTRACTS["mlx-vlm"], 1000)
    assert found.parts["key-value cache"] == 2 * 3 * 2 * 32 * 1000 * 2  # layers, heads, width, float16
    assert found.parts["encoder, running"] == 3 * 64 * 64 * 64 * 4  # hidden width of stage 0 at a quarter of 256
    weights = (folders["mlx"] / "model.safetensors").stat().st_size
    assert found.parts["decoder"] + found.parts["encoder"] == weights
    assert found.total_bytes == sum(found.parts.values())
    twice = estimate(folders["mlx"], CONTRACTS["mlx-vlm"], 2000)
    assert twice.parts["key-value cache"] == 2 * found.parts["key-value cache"]
    wider = estimate(folders["mlx"], CONTRACTS["mlx-swift-lm"], 1000)  # its features are float32
    for part in ("key-value cache", "prefill"):
        assert wider.parts[part] == 2 * found.parts[part]


@pytest.mark.parametrize(("longest", "counted"), [(1024, 1024), (32768, 2048)])
def test_memory_counts_on_no_more_context_than_a_model_has(
    folders: dict[str, Path], tmp_path: Path, longest: int, counted: int
) -> None:
    folder = shutil.copytree(folders["mlx"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    assert estimate(folder, MLX_VLM).context == counted


@pytest.mark.parametrize("context", [0, -1, 10**9])
def test_context_beyond_the_model_is_refused(folders: dict[str, Path], context: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="context must be between 1 and the model's 32768 tokens"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "b", context=context)


@pytest.mark.parametrize(
    ("parts", "advice"),
    [
        ({"decoder": 1e9}, []),
        ({"decoder": 2.3e9}, ["4 GB (iPhone 12 mini): only with the entitlement"]),
        ({"decoder": 8e9}, ["4 GB", "6 GB", "8 GB (iPhone 15 Pro): will not fit", "the decoder with 4 bits"]),
        ({"decoder": 1e9, "key-value cache": 9e9}, ["4 GB", "6 GB", "8 GB", "less than 2048 tokens"]),
    ],
)
def test_advice_says_what_would_help(parts: dict[str, int], advice: list[str]) -> None:
    found = Estimate({name: int(size) for name, size in parts.items()}, 2048).advice
    assert len(found) == len(advice)
    assert all(expected in text for expected, text in zip(advice, found, strict=True))


def test_phones_name_their_source() -> None:
    assert all(phone.source.startswith("https://") and phone.limit_bytes < phone.entitled_bytes for phone in PHONES)
    assert memory.DEFAULT_CONTEXT == 2048
