"""A whole export: what is in the folder, that it repeats, and that a failure leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import fastvlm
from fastvlm.export import atomic_folder, coreai, coreai_asset, exporter, write_encoder
from fastvlm.export.coreai import has_coreai
from fastvlm.export.exporter import export, tokenizer_notes
from fastvlm.export.inspect_package import inspect
from fastvlm.export.tokenizer import export_tokenizer
from fastvlm.export.verify import ENCODER_FLOOR_DB, verify
from fastvlm.models import safetensors_files
from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import ConfigError, MachineError, OutputError, UsageError, VerificationError, WeightsError
from fastvlm.models.folder_layout import saved_weights
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import open_checkpoint
from fastvlm.models.tensor_names import language_shapes, saved_name
from fastvlm.quant.schemes import LinearWeight

pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


QUICKLY: Any = {"encoder": "mlx", "quant": "fp32"}
"""The options of an export whose package does not matter: nothing is converted."""


def test_folder_holds_what_the_formats_name(random_tiny: Path) -> None:
    assert {path.name for path in random_tiny.iterdir()} == {
        "config.json",
        "fastvithd.mlpackage",
        "fastvlm.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((random_tiny / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2"
    assert config["image_token_index"] == 1023
    assert config["quantization"] == {"group_size": 64, "bits": 8}
    preprocessor = json.loads((random_tiny / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 256}
    assert preprocessor["crop_size"] == {"height": 256, "width": 256}
    assert preprocessor["processor_class"] == "LlavaProcessor"
    processor = json.loads((random_tiny / "processor_config.json").read_text())
    assert (processor["image_token"], processor["patch_size"]) == ("<image>", 64)


def test_manifest_describes_every_file(random_tiny: Path) -> None:
    manifest = json.loads((random_tiny / "fastvlm.json").read_text())
    found = contents(random_tiny)
    assert manifest["files"].keys() == found.keys() - {"fastvlm.json"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == len(found[name])
        assert entry["sha256"] == hashlib.sha256(found[name]).hexdigest()
    assert manifest["source"] == {
        "name": "random:tiny",
        "kind": "random",
        "sha256": RandomCheckpoint("tiny").digest(),
    }
    assert manifest["trained"] is False
    assert "the text means nothing" in manifest["notes"][0]
    assert manifest["recipe"]["quant"] == "int8"
    assert manifest["parity"]["image_features"]["snr_db"] > 30
    assert str(random_tiny) not in json.dumps(manifest)


def test_files_are_readable_like_any_other(random_tiny: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in random_tiny.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_two_exports_with_other_thread_counts_are_identical(random_tiny: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = fastvlm.export("random:tiny", out=tmp_path / "again").folder
    finally:
        torch.set_num_threads(threads)
    assert contents(again) == contents(random_tiny)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, exporter.Export]:
    """`random:tiny` with a Core AI asset instead of the package, and with both."""
    if not has_coreai():
        pytest.skip("the extra coreai is not installed (Apple's wheels: Linux x86_64, macOS 26 and later)")
    root = tmp_path_factory.mktemp("formats")
    return {form: export("random:tiny", root / form, format=form) for form in ("coreai", "both")}


def test_asset_is_written_instead_of_the_package_or_with_it(
    exports: dict[str, exporter.Export], random_tiny: Path
) -> None:
    alone, both, plain = contents(exports["coreai"].folder), contents(exports["both"].folder), contents(random_tiny)
    asset = {f"fastvithd.aimodel/{name}" for name in ("main.mlirb", "main.hash", "metadata.json")}
    package = {name for name in plain if name.startswith("fastvithd.mlpackage")}
    assert both.keys() == plain.keys() | asset and alone.keys() == both.keys() - package
    for name in both.keys() - {"fastvlm.json"}:  # a package next to an asset, and an asset without one, are the same
        assert both[name] == plain.get(name, both[name]) and both[name] == alone.get(name, both[name]), name
    sizes = [sum(len(both[name]) for name in names) for names in (asset, package)]
    assert [exports["both"].asset_bytes, exports["both"].encoder_bytes] == sizes
    assert exports["coreai"].asset_bytes == exports["coreai"].encoder_bytes == sizes[0]


def test_manifest_of_an_asset_says_that_it_is_experimental(
    exports: dict[str, exporter.Export], random_tiny: Path
) -> None:
    for form, result in exports.items():
        manifest = json.loads((result.folder / "fastvlm.json").read_text())
        assert manifest["recipe"]["format"] == form
        assert ("target" in manifest["recipe"]) == (form == "both")
        assert {"coreai-core", "coreai-torch"} <= manifest["tools"].keys()
        (note,) = [note for note in manifest["notes"] if note.startswith("fastvithd.aimodel is experimental")]
        assert "macOS 27" in note and note in result.notes
        found = manifest["parity"]
        assert abs(found["coreai"]["snr_db"] - found["image_features"]["snr_db"]) < 1
        assert found["coreai"]["stored_weights"]["snr_db"] > 50
    plain = json.loads((random_tiny / "fastvlm.json").read_text())
    assert "format" not in plain["recipe"] and "coreai" not in plain["parity"] and "coreai-core" not in plain["tools"]


def test_asset_is_verified_or_reported_as_unchecked(
    exports: dict[str, exporter.Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, both = exports["coreai"].folder, exports["both"].folder
    found = verify(alone, "random:tiny")
    assert found.passed and found.asset is found.encoder and found.asset.images == 4
    monkeypatch.setattr(coreai.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'pip install "fastvlm\[coreai\]"'):
        verify(alone, "random:tiny")
    unchecked = verify(both, "random:tiny")
    assert unchecked.passed and unchecked.asset is None
    assert "fastvithd.aimodel" in unchecked.unchecked[0]


def with_other_numbers(asset: Path, one: np.ndarray, other: np.ndarray) -> None:
    """Overwrites the stored numbers `one` in a saved asset, as a faulty converter would, with a hash that fits."""
    program = (asset / "main.mlirb").read_bytes()
    assert program.count(one.tobytes()) == 1 and one.nbytes == other.nbytes
    program = program.replace(one.tobytes(), other.tobytes())
    (asset / "main.mlirb").write_bytes(program)
    (asset / "main.hash").write_bytes(hashlib.sha256(program).digest())


def double_a_scale(asset: Path, stored: Mapping[str, LinearWeight]) -> None:
    weight = stored["10.convffn.fc1"]
    with_other_numbers(asset, weight.scale, weight.scale * np.float16(2))


def repeat_a_block(asset: Path, stored: Mapping[str, LinearWeight]) -> None:
    weight, earlier = stored["11.convffn.fc1"], stored["10.convffn.fc1"]
    with_other_numbers(asset, weight.data, earlier.data)


@pytest.mark.skipif(not has_coreai(), reason="the extra coreai is not installed")
@pytest.mark.parametrize("damage", [double_a_scale, repeat_a_block])
def test_asset_with_wrong_weights_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path, Mapping[str, LinearWeight]], None]
) -> None:
    def write_asset(network: Any, stored: Any, image_size: int, asset: Path, *rest: Any) -> None:
        coreai_asset.write_asset(network, stored, image_size, asset, *rest)
        damage(asset, stored)

    monkeypatch.setattr(write_encoder, "write_asset", write_asset)
    with pytest.raises(
        VerificationError, match=r"fastvithd\.aimodel: image_features, compared with torch with the same"
    ):
        export("random:tiny", tmp_path / "model", format="coreai")
    assert list(tmp_path.iterdir()) == []


def test_asset_without_the_extra_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreai.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"format='both' needs .*pip install") as raised:
        export("random:tiny", tmp_path / "model", format="both")
    assert raised.value.arguments == ("format",)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "embeddings"), [(16, True), (8, False), (4, True)])
def test_decoder_weights_are_stored_as_asked(tmp_path: Path, bits: int, embeddings: bool) -> None:
    result = export(
        "random:tiny", out=tmp_path / "model", quant="fp16", decoder_bits=bits, quantize_embeddings=embeddings
    )
    tensors = load_file(result.folder / "model.safetensors")
    checkpoint = RandomCheckpoint("tiny")
    plain = {saved_name(name): shape for name, shape in language_shapes(checkpoint.config).items()}
    quantized = {name.removesuffix(".scales") + ".weight" for name in tensors if name.endswith(".scales")}
    matrices = {name for name, shape in plain.items() if len(shape) == 2 and name.startswith("language_model")}
    table = "language_model.model.embed_tokens.weight"
    assert quantized == (set() if bits == 16 else matrices if embeddings else matrices - {table})
    for name, shape in plain.items():
        if name in quantized:
            assert tensors[name].dtype == np.uint32
            assert tensors[name].shape == (shape[0], shape[1] * bits // 32)
        else:
            assert tensors[name].dtype == np.float16
            assert tensors[name].shape == shape
    config = json.loads((result.folder / "config.json").read_text())
    assert ("quantization" in config) == (bits < 16)


def test_rows_that_do_not_divide_into_groups_stay_float16(write_checkpoint: Callable, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:  # an intermediate size of 320: not a multiple of 128
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensors[name] = tensors[name][:320]
            elif name.endswith("down_proj.weight"):
                tensors[name] = tensors[name][:, :320]

    source = write_checkpoint(change=change)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 320}))
    tensors = load_file(export(source, tmp_path / "model", group_size=128, **QUICKLY).folder / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.scales" in tensors  # rows of 128
    assert "language_model.model.layers.0.mlp.down_proj.scales" not in tensors  # rows of 320
    assert tensors["language_model.model.layers.0.mlp.down_proj.weight"].dtype == np.float16


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_decoder_reaches_the_measured_snr(golden: Path, tolerance: Callable, tmp_path: Path, bits: int) -> None:
    for name in ("llava_small_reparam_tied", "llava_small_train_untied"):
        result = export(golden / name, tmp_path / name, decoder_bits=bits, **QUICKLY)
        assert result.verification.decoder.logits.snr_db > tolerance(f"decoder_{bits}_snr_db")


def test_shortfall_is_written_only_when_allowed_and_then_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODER_FLOOR_DB, "fp16", 150.0)
    result = export("random:tiny", out=tmp_path / "model", quant="fp16", allow_shortfall=True)
    manifest = json.loads((result.folder / "fastvlm.json").read_text())
    assert any("the floor is 150 dB" in note for note in manifest["notes"])
    assert not result.verification.passed


def test_weights_that_int8_would_spoil_stay_float16(write_checkpoint: Callable, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:  # FastViT's initial layer scale: int8's float16 scales would be zero
            if name.endswith("network.10.0.layer_scale_2"):
                tensors[name][:] = 1e-5

    plain = export(write_checkpoint(), tmp_path / "plain")
    result = export(write_checkpoint(change=change), tmp_path / "model")
    assert result.verification.encoder.output.snr_db > 33
    counts = [inspect(r.folder).compressed_weights for r in (plain, result)]
    assert counts[1] == counts[0] - 1


def test_errors_of_files_that_are_read_do_not_blame_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "/data/checkpoint/model.safetensors")

    monkeypatch.setattr(exporter, "write_weights", unreadable)
    with pytest.raises(PermissionError):
        export("random:tiny", out=tmp_path / "model", **QUICKLY)
    assert list(tmp_path.iterdir()) == []


def test_replacement_that_was_killed_halfway_is_undone(random_tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(random_tiny, out)
    before = contents(out)
    out.rename(tmp_path / ".model.replaced-999999999")
    atomic_folder.remove_abandoned(out)
    assert contents(out) == before


def test_export_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    export("random:tiny", out=".", **QUICKLY)
    assert (here / "fastvlm.json").is_file()


def test_large_decoders_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_tiny: Path) -> None:
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 300_000)
    folder = export("random:tiny", out=tmp_path / "model").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    merged = {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    whole = load_file(random_tiny / "model.safetensors")
    assert merged.keys() == whole.keys() == index["weight_map"].keys()
    assert all(np.array_equal(merged[name], whole[name]) for name in whole)


def test_checkpoint_is_unchanged_and_named_in_the_manifest(write_checkpoint: Callable, tmp_path: Path) -> None:
    source = write_checkpoint()
    before = contents(source)
    result = export(source, tmp_path / "model", **QUICKLY)
    assert contents(source) == before
    assert result.trained
    manifest = json.loads((result.folder / "fastvlm.json").read_text())
    assert manifest["source"]["sha256"] == FolderCheckpoint(source).digest()


def no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["write_weights", "write_configs", "file_table"])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(exporter, step, no_space)
    with pytest.raises(OutputError, match="the disk is full"):
        export("random:tiny", out=tmp_path / "model", **QUICKLY)
    assert list(tmp_path.iterdir()) == []


def test_native_writers_failure_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data to the file.")

    monkeypatch.setattr(exporter, "write_weights", fails)
    with pytest.raises(RuntimeError):
        export("random:tiny", out=tmp_path / "model", **QUICKLY)
    usage = atomic_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporter, "check_space", lambda *_: None)
    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OutputError, match="the disk is full"):
        export("random:tiny", out=tmp_path / "model", **QUICKLY)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs about [\d,]+ MB while it is written"):
        exporter.check_space(tmp_path / "a" / "b", 10**16)
    stages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "bytes_needed", lambda *_: 10**16)
        with pytest.raises(OutputError, match="not enough space"):
            export("random:tiny", out=tmp_path / "model", on_stage=stages.append)
    assert stages == []


def test_existing_folder_needs_force(random_tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(random_tiny, out)
    before = contents(out)
    with pytest.raises(OutputError, match="Pass force=True"):
        export("random:tiny", out=out)
    assert contents(out) == before
    export("random:tiny", out=out, force=True, **QUICKLY)
    assert contents(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_force_does_not_replace_what_is_not_ours(tmp_path: Path) -> None:
    (precious := tmp_path / "precious").mkdir()
    (precious / "thesis.tex").write_text("all of it")
    with pytest.raises(OutputError, match="was not written by fastvlm"):
        export("random:tiny", out=precious, force=True)
    (file := tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        export("random:tiny", out=file, force=True)
    assert (precious / "thesis.tex").read_text() == "all of it"


def test_failed_verification_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODER_FLOOR_DB, "fp16", 150.0)
    with pytest.raises(VerificationError, match=r"image_features of drawings reach \d+.\d dB, the floor is 150 dB"):
        export("random:tiny", out=tmp_path / "model", quant="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "int3"}, UsageError, "quant must be one of fp16, int8"),
        ({"decoder_bits": 3}, UsageError, "decoder_bits must be one of 4, 5, 6, 8, 16, mixed"),
        ({"group_size": 48}, UsageError, "group_size must be one of 32, 64, 128"),
        ({"image_size": 100}, ConfigError, "multiple of 64 from 128 to 2048"),
        ({"image_size": 4096}, ConfigError, "multiple of 64 from 128 to 2048"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    tmp_path: Path, options: dict, error: type[Exception], message: str
) -> None:
    stages: list[str] = []
    with pytest.raises(error, match=message):
        export("random:tiny", out=tmp_path / "model", on_stage=stages.append, **options)
    assert stages == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_decoder_weights_that_do_not_fit_float16_are_refused(
    write_checkpoint: Callable, tmp_path: Path, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value

    with pytest.raises(WeightsError, match=r"model.layers.1.mlp.up_proj.weight holds NaN, infinite values or numbers"):
        export(write_checkpoint(change=change), tmp_path / "model", **QUICKLY)
    assert not (tmp_path / "model").exists()


def test_stale_decoder_tensors_are_listed_before_any_work(write_checkpoint: Callable, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(1)

    stages: list[str] = []
    with pytest.raises(WeightsError, match=r"1 missing: model.norm.weight; 1 unexpected: model.layers.3.mlp.up_proj"):
        export(write_checkpoint(change=change), tmp_path / "model", on_stage=stages.append)
    assert stages == []


def test_partial_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead, alive, other = (
        tmp_path / name for name in (".model.partial-999999999", f".model.partial-{os.getppid()}", ".x")
    )
    for folder in (dead, alive, other):
        folder.mkdir()
    export("random:tiny", out=tmp_path / "model", **QUICKLY)
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()


def test_stream_beyond_float16_is_rescaled_and_said(
    write_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        """Stage 2's stream passes 65,504, and what reads it brings it back, as in trained weights."""
        for name in tensors:
            if name.endswith(("network.4.0.layer_scale", "network.4.1.layer_scale")):
                tensors[name] *= 400_000
            readers = (
                "network.4.1.convffn.conv.conv.weight",
                "proj.0.lkb_origin.conv.weight",
                "small_conv.conv.weight",
            )
            if ("network.4." in name or "network.5." in name) and name.endswith(readers):
                tensors[name] /= 400_000

    source = write_checkpoint(change=change)
    result = export(source, tmp_path / "scaled", quant="fp16")
    assert "the residual stream was rescaled, exactly, to fit float16: stage 2 by 0." in result.notes[0]
    assert result.verification.encoder.stages["stage 2"] > 40  # compared with the scale undone
    monkeypatch.setattr(write_encoder, "stream_scales", lambda *maxima: [1.0] * len(maxima[0]))
    with pytest.raises(VerificationError, match=r"float16 overflows \(first at"):
        export(source, tmp_path / "plain", quant="fp16")
    assert not (tmp_path / "plain").exists()


def test_roundabout_names_do_not_lose_an_existing_export(random_tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(random_tiny, out)
    before = contents(out)
    roundabout = out / "gone" / ".." / ".." / "model"
    with pytest.raises(OutputError, match="Pass force=True"):
        export("random:tiny", out=roundabout, quant="int8")
    assert contents(out) == before
    export("random:tiny", out=out / ".." / "model", force=True, **QUICKLY)
    assert contents(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_negative_variances_are_refused(write_checkpoint: Callable, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("network.0.0.convffn.conv.bn.running_var"))
        tensors[name] *= -1

    with pytest.raises(WeightsError, match="NaN or infinite"):
        export(write_checkpoint(change=change), tmp_path / "model")
    assert not (tmp_path / "model").exists()


MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    draw = torch.Generator().manual_seed(0)
    tensors = {"A": torch.randn((4, 384), generator=draw), "B": torch.randn((128, 4), generator=draw)}
    named = {f"base_model.model.{MODULE}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_adapter_is_in_the_exported_weights_and_verified(tmp_path: Path, adapter: Path) -> None:
    result = export("random:tiny", tmp_path / "model", adapter=adapter, decoder_bits=16, **QUICKLY)
    assert not result.trained
    assert result.checkpoint == "random:tiny+adapter"
    saved = saved_weights(tmp_path / "model")[f"language_model.{MODULE}.weight"]
    merged = open_checkpoint("random:tiny", adapter).read(f"{MODULE}.weight", "pt")
    assert np.array_equal(np.array(saved), merged.astype(np.float16))
    assert verify(tmp_path / "model", "random:tiny", adapter=adapter).passed
    unmerged = verify(tmp_path / "model", "random:tiny")
    assert "down_proj" in " ".join(unmerged.failures)


def test_notes_on_the_tokenizer_name_ends_and_rows(write_checkpoint: Callable) -> None:
    folder = write_checkpoint()
    whole = FolderCheckpoint(folder)
    assert tokenizer_notes(whole, export_tokenizer(whole.tokenizer_files())) == ()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [{**last, "id": last["id"] + 1 + k, "content": f"<new{k}>"} for k in range(9)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings["chat_template"].replace("add_generation_prompt", "false")
    settings |= {"eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = FolderCheckpoint(folder)
    end, answer, rows = tokenizer_notes(changed, export_tokenizer(changed.tokenizer_files()))
    assert "no config names token 1022 as an end" in end
    assert "ignores add_generation_prompt" in answer
    assert f"ids up to {last['id'] + 9}, but embed_tokens has 1024 rows" in rows
