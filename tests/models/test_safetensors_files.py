"""Safetensors files: untrusted headers, shards and their index."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.errors import CheckpointError, WeightsError
from fastvlm.models.safetensors_files import MAX_HEADER_BYTES, TensorInfo, read_header, tensor_files

WriteCheckpoint = Callable[..., Path]

WHOLE = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: int = 32, length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + bytes(data))
    return path


def changed(name: str = "b", **fields: Any) -> dict[str, Any]:
    return {**WHOLE, name: {**WHOLE[name], **fields}}


def test_header_equals_that_of_the_library(tmp_path: Path) -> None:
    tensors = {"x.weight": np.zeros((3, 5), np.float16), "y": np.zeros((), np.int64), "empty": np.zeros((0, 2))}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    assert read_header(tmp_path / "f") == {
        "x.weight": TensorInfo((3, 5), "F16"),
        "y": TensorInfo((), "I64"),
        "empty": TensorInfo((0, 2), "F64"),
    }


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (WHOLE, {"data": 31}, r"take 32 bytes, but the data has 31"),
        (WHOLE, {"data": 33}, r"take 32 bytes, but the data has 33"),
        (WHOLE, {"length": 2**63}, r"header must have 9223372036854775808 bytes, got"),
        (WHOLE, {"length": 0}, "not a JSON object"),
        (b" " * 20, {}, "not a JSON object"),
        (b'{"a": 1', {}, "not valid JSON"),
        (b'{"a": NaN}', {}, "NaN is not a JSON number"),
        (b"{" * 5000, {}, "not valid JSON"),
        (json.dumps(WHOLE).encode()[:-1] + b', "a": {}}', {}, "duplicate key 'a'"),
        (changed(data_offsets=[20, 28]), {}, "'b' must begin at byte 24 of the data, got 20"),
        (changed(data_offsets=[25, 33]), {"data": 33}, "must begin at byte 24 of the data, got 25"),
        (changed(data_offsets=[-8, 0]), {}, "data_offsets"),
        (changed(data_offsets=[32, 24]), {}, "data_offsets"),
        (changed(data_offsets=[24]), {}, "data_offsets"),
        (changed(data_offsets=[24, 10**30]), {}, "data_offsets"),
        (changed(dtype="F32"), {}, r"'b' of F32 \[4\] must take 16 bytes, got 8"),
        (changed(dtype="object"), {}, "has the unsupported dtype 'object'"),
        (changed(dtype=["F32"]), {}, "has the unsupported dtype"),
        (changed(shape=[2, 2, 2]), {}, "must take 16 bytes, got 8"),
        (changed(shape=[-2, -2]), {}, r"has the invalid shape \[-2, -2\]"),
        (changed(shape=[4.0]), {}, "has the invalid shape"),
        (changed(shape=[True, 4]), {}, "has the invalid shape"),
        (changed(shape=[1] * 9), {}, "has the invalid shape"),
        (changed(shape="4"), {}, "has the invalid shape"),
        (changed(more=1), {}, "must have dtype, shape and data_offsets"),
        ({**WHOLE, "c": None}, {}, "must have dtype"),
        ({**WHOLE, "__metadata__": {"format": 1}}, {}, "__metadata__"),
    ],
)
def test_weights_error_when_a_header_cannot_be_trusted(
    tmp_path: Path, header: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(WeightsError, match=rf"(?s)not a whole safetensors file .*{message}"):
        read_header(write(tmp_path / "f", header, **options))


@pytest.mark.parametrize(("name", "fault"), [("x" * 5000, "File name too long"), ("a\0x", "null byte")])
def test_weights_error_when_a_file_name_is_impossible(tmp_path: Path, name: str, fault: str) -> None:
    with pytest.raises(WeightsError, match=f"x cannot be read: .*{fault}"):
        read_header(tmp_path / name)


def test_weights_error_when_a_header_is_huge_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_000))
        stream.truncate(200_000_000)  # sparse: takes no disk
    with pytest.raises(WeightsError, match=f"at most {MAX_HEADER_BYTES} bytes, got 100000000"):
        read_header(file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_accepted_headers_are_those_of_the_library(tmp_path: Path, data: st.DataObject) -> None:
    """The only error is WeightsError. Accepted files are read by safetensors itself, with the same shapes."""
    content = bytearray(write(tmp_path / "f", WHOLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 33))
        content[place] = data.draw(st.sampled_from(b'0123456789[]{},:"-e. ' + bytes([0, 255])))
    (tmp_path / "f").write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        found = read_header(tmp_path / "f")
    except WeightsError:
        return
    with safe_open(tmp_path / "f", framework="numpy") as stream:
        assert {name: tuple(stream.get_slice(name).get_shape()) for name in found} == {
            name: info.shape for name, info in found.items()
        }


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
    with pytest.raises(WeightsError, match=r"1 of 2 shards are missing: model-00002-of-00002.safetensors"):
        FolderCheckpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(write_checkpoint: WriteCheckpoint, keep: int) -> None:
    folder = write_checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a whole safetensors file|is an empty file"):
        FolderCheckpoint(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5133048\n"
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4096)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a git-lfs pointer, not the file itself. Run `git lfs install` and `git lfs pull`"),
        (APPLE_DOUBLE, "is an AppleDouble file"),
        (bytes(5000), "is a file of zeros: a download or a copy did not finish"),
        (b"<!DOCTYPE html><html>Not Found</html>", "is a web page"),
        (b"Invalid username or password.", "is a text, not the file itself .it begins with 'Invalid username"),
        (b"GGUF\3\0\0\0" + bytes(99), "is a GGUF file of llama.cpp"),
        (b"PK\x03\x04" + bytes(99), "is a pickle of PyTorch with another name"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file of Keras"),
    ],
)
def test_other_files_under_the_name_of_weights_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=f"model.safetensors {message}"):
        tensor_files(tmp_path)


def save(folder: Path, **files: list[str]) -> Path:
    """Writes weight files, each with the named tensors."""
    for name, tensors in files.items():
        file = name.replace("_of_", "-of-").replace("model_0", "model-0")
        save_file({tensor: np.zeros(1, np.float32) for tensor in tensors}, folder / f"{file}.safetensors")
    return folder


def test_files_that_macos_adds_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, model=["a"])
    for name in ("._model.safetensors", ".DS_Store", "._config.json"):
        (tmp_path / name).write_bytes(APPLE_DOUBLE)
    assert tensor_files(tmp_path).files == {"a": tmp_path / "model.safetensors"}


def test_shards_without_an_index_are_read_by_their_names(tmp_path: Path) -> None:
    save(tmp_path, model_00001_of_00002=["a"], model_00002_of_00002=["b", "c"])
    found = tensor_files(tmp_path).files
    assert {name: file.name[6:11] for name, file in found.items()} == {"a": "00001", "b": "00002", "c": "00002"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_00001_of_00003": ["a"], "model_00003_of_00003": ["b"]}, "1 of 3 shards are missing: model-00002-of"),
        ({"model_00001_of_00002": ["a"]}, "1 of 2 shards are missing"),
        ({"model_00001_of_00002": ["a"], "model_00002_of_00002": ["a"]}, "two shards have a "),
        ({"model_00001_of_00002": ["a"], "other_00002_of_00002": ["b"]}, "2 .*files and no model.safetensors.index"),
        ({"one": ["a"], "two": ["b"]}, "2 .*files and no model.safetensors.index.json: one.safetensors, two"),
    ],
)
def test_incomplete_or_mixed_shards_are_refused(tmp_path: Path, files: dict[str, list[str]], message: str) -> None:
    save(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    "extra", ["adapter_model", "adapters", "0000100_adapters", "non_lora_trainables", "mm_projector"]
)
def test_adapter_in_the_folder_of_its_base_is_not_read(tmp_path: Path, extra: str) -> None:
    save(tmp_path, model=["a"], **{extra: ["b"]})
    found = tensor_files(tmp_path)
    assert list(found.files) == ["a"]
    assert found.notes == (f"{extra}.safetensors is not merged into the checkpoint (adapter=FOLDER merges it)",)


def test_other_weights_than_the_named_ones_are_noted(tmp_path: Path) -> None:
    save(tmp_path, model=["a"], model_ema=["a"])
    found = tensor_files(tmp_path)
    assert found.files == {"a": tmp_path / "model.safetensors"}
    assert found.notes == ("model_ema.safetensors is not read: model.safetensors has the weights",)


def index(folder: Path, **weight_map: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name.replace("__", "."): file for name, file in weight_map.items()}})
    )
    return folder


def test_head_that_no_shard_has_may_be_in_the_index(tmp_path: Path) -> None:
    save(tmp_path, part=["a"])
    index(tmp_path, a="part.safetensors", lm_head__weight="part.safetensors")
    assert list(tensor_files(tmp_path).files) == ["a"]
    index(tmp_path, a="part.safetensors", b="part.safetensors")
    with pytest.raises(WeightsError, match="disagree on 1 tensors: b"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["m.gguf", "mmproj.gguf"], "It is for llama.cpp .GGUF. .got m.gguf, mmproj.gguf.. Pass a checkpoint"),
        (["onnx/decoder_model_merged_q4.onnx"], "It is for ONNX Runtime"),
        (["global_step100/x", "zero_to_fp32.py", "latest"], "It is a DeepSpeed checkpoint.*zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "PyTorch's FSDP.*accelerate merge-weights"),
        (["FastVLM.litertlm"], "It is for LiteRT"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "a LoRA fine-tune without its base.*Pass the base as model",
        ),
        (["mm_projector.safetensors"], "LLaVA's first stage, which has only the projector.*base=MODEL"),
        (["mm_projector.bin"], "LLaVA's first stage, which has only the projector.*base=MODEL"),
        (["model.safetensors.incomplete"], "It is an unfinished download"),
        (["llava-fastvithd_0.5b_stage3.zip"], "It is the folder of an archive.*Unpack it"),
        (["fastvithd.mlpackage/x"], "It is a Core ML model without the decoder's weights"),
        (["pytorch_model.bin", "onnx/m.onnx"], "found the pickle pytorch_model.bin.*allow_pickle=True"),
        (
            ["checkpoint-500/x", "llava-fastvithd_0.5b_stage3/x"],
            "Pass a checkpoint inside it .got checkpoint-500, llava",
        ),
        (["snapshots/abc/config.json", "refs/main"], "Pass a checkpoint inside it .got snapshots/abc."),
        (["training_args.bin", "optimizer.pt", "._m.gguf"], "found optimizer.pt, training_args.bin"),
        (["._m.gguf"], "the folder is empty"),
    ],
)
def test_folder_without_weights_is_named_for_what_it_is(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"it has no \*.safetensors.*{message}") as caught:
        tensor_files(tmp_path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_raises_weights_error_only(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "damaged.safetensors"
    save_file({"a": np.zeros((4, 4), np.float32), "b": np.ones(3, np.float32)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        header = read_header(file)
    except WeightsError:
        return
    assert all(isinstance(info.shape, tuple) for info in header.values())


def test_pickles_are_refused_with_the_conversion(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle pytorch_model.bin.*save_file"):
        FolderCheckpoint(folder)
