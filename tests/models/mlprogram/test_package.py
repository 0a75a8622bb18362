"""Reading a package and its weights: the contents of a valid one, and one clear error for anything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import Constants, census, max_rank, read_package, stored_bytes
from fastvlm.models.mlprogram.package import BlobFile
from fastvlm.models.mlprogram.program import NUMPY_TYPES, TensorType

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture
def copy(small_package: Path, tmp_path: Path) -> Path:
    """A copy of the package, free to be damaged."""
    return Path(shutil.copytree(small_package, tmp_path / "copy.mlpackage"))


@pytest.mark.slow
def test_program_has_the_contents_of_the_package(small_package: Path) -> None:
    program = read_package(small_package)
    assert [(t.name, t.dtype, t.shape) for t in program.inputs] == [("x", "fp32", (1, 8, 6, 6))]
    assert [(t.dtype, t.shape) for t in program.outputs] == [("fp32", (1, 16, 6, 6))]
    assert (program.spec_version, program.opset) == (8, "CoreML7")
    assert program.metadata["com.github.apple.coremltools.version"] == "9.0"
    assert program.path == small_package
    assert census(program) == {"conv": 2, "gelu": 1, "cast": 2}
    assert max_rank(program) == 4
    assert stored_bytes(program) == {"fp16": 2 * (16 * 8 * 9 + 16 + 16 * 16 + 16)}


def test_operations_have_names_values_and_types(small_package: Path) -> None:
    program = read_package(small_package)
    conv = next(o for o in program.operations if o.kind == "conv")
    assert conv.outputs[0].name.startswith("first")
    assert program.producers[conv.outputs[0].name] is conv
    constants = Constants(program)
    assert constants.array(conv.inputs["pad_type"][0]).item() == "same"
    assert constants.array(conv.inputs["strides"][0]).tolist() == [1, 1]
    weight = constants.array(conv.inputs["weight"][0])
    assert (weight.dtype, weight.shape) == (np.float16, (16, 8, 3, 3))
    assert not weight.flags.writeable and not weight.flags.owndata


def test_path_can_be_a_string_or_a_link(small_package: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mlpackage").symlink_to(small_package)
    assert census(read_package(str(tmp_path / "link.mlpackage"))) == census(read_package(small_package))


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.mlmodel"
    file.write_bytes(b"")
    compiled = tmp_path / "model.mlmodelc"
    compiled.mkdir()
    for path, message in [(file, "got a file"), (tmp_path / "no", "got nothing"), (tmp_path, "got none")]:
        with pytest.raises(PackageError, match=message):
            read_package(path)
    with pytest.raises(PackageError, match=r"compiled model.*Pass the \.mlpackage"):
        read_package(compiled)


@pytest.mark.parametrize("missing", [MODEL, WEIGHTS])
def test_missing_file_is_named(copy: Path, missing: Path) -> None:
    (copy / missing).unlink()
    with pytest.raises(PackageError, match=f"{missing.name}.*missing"):
        read_package(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"itemInfoEntries": 3}', "[" * 100_000, "\udcff"])
def test_bad_manifest_is_refused(copy: Path, content: str) -> None:
    (copy / "Manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(PackageError, match=r"Manifest\.json"):
        read_package(copy)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1500000\n"


@pytest.mark.parametrize("file", [Path("Manifest.json"), MODEL, WEIGHTS])
@pytest.mark.parametrize(("content", "what"), [(LFS, "a git-lfs pointer, not the file itself"), (b"", "an empty file")])
def test_files_of_a_clone_without_lfs_are_named(copy: Path, file: Path, content: bytes, what: str) -> None:
    if file == MODEL and not content:
        return  # an empty message is a valid one, of another type
    (copy / file).write_bytes(content)
    with pytest.raises(PackageError, match=rf"{file.name}( is {what}|: cannot be memory-mapped)"):
        read_package(copy)


def test_system_files_in_a_package_change_nothing(copy: Path) -> None:
    before = census(read_package(copy))
    for folder in (copy, (copy / MODEL).parent, (copy / WEIGHTS).parent):
        for name in (".DS_Store", "._weight.bin", "._model.mlmodel"):
            (folder / name).write_bytes(b"\0\5\x16\7" + bytes(99))
    assert census(read_package(copy)) == before


def test_too_large_manifest_is_not_read(copy: Path) -> None:
    with (copy / "Manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file, which takes no disk space
    with pytest.raises(PackageError, match="must have at most 1048576 bytes"):
        read_package(copy)


@pytest.mark.parametrize(
    "target", ["../../outside.mlmodel", "/etc/hostname", "nul\0", "two\nlines", 7, "../Data/../Manifest.json"]
)
def test_manifest_path_outside_is_refused(copy: Path, target: Any) -> None:
    manifest = json.loads((copy / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = target
    (copy / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"must be a path|must only have paths inside|is not a usable path"):
        read_package(copy)


def test_too_long_manifest_path_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "x" * 5000
    (copy / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"is missing\. Copy the whole package"):
        read_package(copy)


@pytest.mark.parametrize("which", [MODEL, WEIGHTS])
def test_link_that_leaves_the_package_is_refused(copy: Path, tmp_path: Path, which: Path) -> None:
    outside = tmp_path / "outside.bin"
    shutil.move(copy / which, outside)
    (copy / which).symlink_to(outside)
    with pytest.raises(PackageError, match="paths inside the package"):
        read_package(copy)


def test_named_pipe_as_weights_does_not_block(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    os.mkfifo(copy / WEIGHTS)
    with pytest.raises(PackageError, match="missing"):
        read_package(copy)


@pytest.mark.parametrize(
    "name", ["@model_path/../../../secret", "/etc/hostname", "weight.bin", "@model_path//etc/hostname"]
)
def test_weights_path_outside_is_refused(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any], name: str
) -> None:
    def change(model: Any) -> None:
        blob = next(o for o in block_of(model).operations if o.attributes["val"].WhichOneof("value") == "blobFileValue")
        blob.attributes["val"].blobFileValue.fileName = name

    with pytest.raises(PackageError, match=r"only have paths inside|under @model_path/, got"):
        read_package(edit(small_package, change))


def _drop_block(model: Any) -> None:
    model.mlProgram.functions["main"].opset = "CoreML99"


def _another_type(model: Any) -> None:
    model.neuralNetwork.SetInParent()


def _rename_input(model: Any) -> None:
    model.description.input[0].name = "pixels"


def _another_default(model: Any) -> None:
    model.description.defaultFunctionName = "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_default, r"function_name must be one of main \(got 'other'\)"),
        (_drop_block, "block for opset 'CoreML99'"),
        (_another_type, "must be an mlProgram, got neuralNetwork"),
        (_rename_input, r"description has inputs \['pixels'\], the program \['x'\]"),
    ],
)
def test_other_model_type_is_refused(
    small_package: Path, edit: Callable[..., Path], change: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(PackageError, match=message):
        read_package(edit(small_package, change))


def _read_before_computed(block: Any) -> None:
    block.operations[-1].inputs["x"].arguments[0].name = "later"


def _same_name_twice(block: Any) -> None:
    block.operations[-1].outputs[0].name = "x"


def _too_few_values(block: Any) -> None:
    strides = next(o for o in block.operations if o.outputs[0].name.endswith("strides_0"))
    strides.attributes["val"].immediateValue.tensor.ints.values.pop()


def _wrong_field(block: Any) -> None:
    strides = next(o for o in block.operations if o.outputs[0].name.endswith("strides_0"))
    strides.attributes["val"].immediateValue.tensor.floats.values.append(1.0)


def _out_of_range(block: Any) -> None:
    strides = next(o for o in block.operations if o.outputs[0].name.endswith("strides_0")).attributes["val"]
    strides.type.tensorType.dataType = 22  # int16
    strides.immediateValue.tensor.ints.values[0] = 70_000


def _absurd_shape(block: Any) -> None:
    for dimension in block.operations[-1].outputs[0].type.tensorType.dimensions:
        dimension.constant.size = 1 << 31


def _rank_against_dimensions(block: Any) -> None:
    block.operations[-1].outputs[0].type.tensorType.rank = 9


def _unknown_type(block: Any) -> None:
    block.operations[-1].outputs[0].type.tensorType.dataType = 40


def _inner_block(block: Any) -> None:
    block.operations[-1].blocks.add()


def _name_of_two_lines(block: Any) -> None:
    block.operations[-1].outputs[0].name = "two\nlines"


def _not_a_tensor(block: Any) -> None:
    block.operations[-1].outputs[0].type.tupleType.SetInParent()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_read_before_computed, "reads 'later', which nothing before it computes"),
        (_same_name_twice, "'x' twice"),
        (_too_few_values, "must have 2 ints, got 1"),
        (_wrong_field, "in field ints, got floats"),
        (_out_of_range, r"range of int16, got 1\.\.70000"),
        (_absurd_shape, r"at most 2\^48 elements"),
        (_rank_against_dimensions, "must have 9 dimensions .*got 4"),
        (_unknown_type, "data type must be .*, got FLOAT8E4M3FN"),
        (_inner_block, "inner blocks"),
        (_name_of_two_lines, r"printable characters, got 'two\\nlines'"),
        (_not_a_tensor, "must be a tensor, got tupleType"),
    ],
)
def test_broken_graph_is_refused(
    small_package: Path,
    edit: Callable[..., Path],
    block_of: Callable[[Any], Any],
    change: Callable[[Any], None],
    message: str,
) -> None:
    with pytest.raises(PackageError, match=message) as caught:
        read_package(edit(small_package, lambda model: change(block_of(model))))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_package_is_read_or_raises_one_error(
    small_package: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = tmp_path_factory.getbasetemp() / "damaged.mlpackage"
    shutil.copytree(small_package, damaged, dirs_exist_ok=True)
    victim = damaged / data.draw(st.sampled_from([MODEL, MODEL, WEIGHTS, Path("Manifest.json")]))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    victim.write_bytes(content[:length])
    try:
        program = read_package(damaged)
        constants = Constants(program)
        for operation in program.operations:
            if operation.is_constant and operation.outputs:
                constants.decode(operation)
        census(program), max_rank(program), stored_bytes(program)
    except PackageError as error:
        assert "\n" not in str(error)


OURS = "from fastvlm.models.mlprogram import model_class; M = model_class()"
THEIRS = "import coremltools as ct; R = ct.proto.Model_pb2.Model"
SAME = """
from coremltools.converters.mil import Builder as mb
spec = M(specificationVersion=8)
spec.description.input.add(name="images")
assert M is R, "two classes for one message"
assert R.FromString(spec.SerializeToString()).description.input[0].name == "images"
assert ct.proto.MIL_pb2.Program is type(spec.mlProgram)
"""


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["before coremltools", "after coremltools"])
def test_model_class_is_coremltools_own_in_either_order(order: tuple[str, str]) -> None:
    python("\n".join([*order, SAME]))


def test_reading_imports_neither_coremltools_nor_torch() -> None:
    code = f"{OURS}\nimport sys, fastvlm.models.mlprogram as m\nm.read_package\n"
    loaded = python(code + "print([n for n in ('coremltools', 'torch', 'mlx') if n in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.mark.slow
def test_executor_is_an_attribute_of_the_package() -> None:
    code = "import fastvlm.models.mlprogram as m, sys; m.Executor; print('torch' in sys.modules)"
    assert python(code).strip() == "True"


def test_missing_coremltools_is_a_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm.models.errors import MachineError
    from fastvlm.models.mlprogram import package

    monkeypatch.setattr(package.importlib.machinery.PathFinder, "find_spec", lambda *_: None)
    monkeypatch.setattr(package, "_ALIAS", "an_alias_of_this_test")
    with pytest.raises(MachineError, match="pip install coremltools"):
        package.model_class()


SHAPE = (3, 1, 7)  # 21 elements end inside a byte for every width below one
WRITERS = {"fp32": "float"}
RANGES = {"int4": (-8, 8), "uint1": (0, 2), "uint2": (0, 4), "uint3": (0, 8), "uint4": (0, 16), "uint6": (0, 64)}
DTYPES = ["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "uint32", *RANGES]


def sample(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(len(dtype))
    if dtype.startswith("fp"):
        return rng.normal(size=SHAPE).astype(NUMPY_TYPES[dtype])
    info = np.iinfo(NUMPY_TYPES[dtype])
    low, high = RANGES.get(dtype, (int(info.min), int(info.max) + 1))
    return rng.integers(low, high, size=SHAPE).astype(NUMPY_TYPES[dtype])


@pytest.fixture(scope="module")
def blobs(ct: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A file with one entry of every type, written by coremltools, and the offset of each."""
    from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path_factory.mktemp("blob") / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    offsets = {}
    for dtype in DTYPES:
        flat = np.ascontiguousarray(sample(dtype).reshape(-1))
        flat = flat.view(np.uint16) if dtype == "fp16" else flat
        offsets[dtype] = getattr(writer, f"write_{WRITERS.get(dtype, dtype)}_data")(flat)
    del writer
    return path, offsets


@pytest.mark.parametrize("dtype", DTYPES)
def test_entry_is_read_as_coremltools_wrote_it(blobs: tuple[Path, dict[str, int]], dtype: str) -> None:
    path, offsets = blobs
    value = BlobFile(path).value(TensorType("w", dtype, SHAPE), offsets[dtype])
    found = value.array()
    assert found.dtype == sample(dtype).dtype
    np.testing.assert_array_equal(found, sample(dtype))


def test_value_is_a_view_of_the_file_and_cannot_be_written(blobs: tuple[Path, dict[str, int]]) -> None:
    path, offsets = blobs
    file = BlobFile(path)
    array = file.value(TensorType("w", "fp32", SHAPE), offsets["fp32"]).array()
    assert np.shares_memory(array, file._bytes)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("int8", SHAPE, "must be of type int8"),
        ("fp32", (3, 1, 8), "must have 96 bytes"),
        ("fp32", (1 << 40, 1 << 40), "bytes"),
    ],
)
def test_entry_of_another_type_or_size_is_refused(
    blobs: tuple[Path, dict[str, int]], dtype: str, shape: tuple[int, ...], message: str
) -> None:
    path, offsets = blobs
    with pytest.raises(PackageError, match=message):
        BlobFile(path).value(TensorType("w", dtype, shape), offsets["fp32"])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in RANGES])
@settings(max_examples=8)
@given(reserved=st.binary(min_size=40, max_size=40), header=st.binary(min_size=56, max_size=56))
def test_reserved_words_of_older_files_are_not_read(
    blobs: tuple[Path, dict[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    reserved: bytes,
    header: bytes,
) -> None:
    """coremltools 5 to 7 left whatever was in memory after the start of the data, and in the file's header."""
    path, offsets = blobs
    content = bytearray(path.read_bytes())
    content[8:64] = header
    content[offsets[dtype] + 24 : offsets[dtype] + 64] = reserved
    old = tmp_path_factory.getbasetemp() / "old.bin"
    old.write_bytes(content)
    found = BlobFile(old).value(TensorType("w", dtype, SHAPE), offsets[dtype]).array()
    np.testing.assert_array_equal(found, sample(dtype))


OLD_FILE = bytes.fromhex(
    "01000000 02000000" + 56 * "00"  # one entry, version 2
    + "efbeadde 01000000 0400000000000000 8000000000000000"  # float16, 4 bytes at 128
    + "f049511d03000000 00077b6d01000000" + 24 * "aa"  # reserved words as found in a file of coremltools 7.2
    + "003c 00c0" + 60 * "00"
)  # fmt: skip


def test_weight_file_of_coremltools_7_is_read(tmp_path: Path) -> None:
    (tmp_path / "weight.bin").write_bytes(OLD_FILE)
    value = BlobFile(tmp_path / "weight.bin").value(TensorType("w", "fp16", (2,)), 64)
    assert value.array().tolist() == [1.0, -2.0]


def test_other_element_count_in_the_same_bytes_is_refused(blobs: tuple[Path, dict[str, int]]) -> None:
    path, offsets = blobs
    with pytest.raises(PackageError, match="bits"):
        BlobFile(path).value(TensorType("w", "uint4", (22,)), offsets["uint4"])


@pytest.mark.parametrize("offset", [0, 65, 10**6, 2**64 - 1])
def test_wrong_offset_is_refused(blobs: tuple[Path, dict[str, int]], offset: int) -> None:
    with pytest.raises(PackageError, match="must be"):
        BlobFile(blobs[0]).value(TensorType("w", "fp16", SHAPE), offset)


@pytest.mark.parametrize(
    ("place", "replacement", "message"),
    [
        (0, b"\0\0\0\0", "must be 0xdeadbeef"),
        (8, (85).to_bytes(8, "little") + bytes(8) + (8).to_bytes(8, "little"), "must have 84 bytes"),
        (16, (2**64 - 1).to_bytes(8, "little"), "got only"),
    ],
    ids=["sentinel", "size with as many unused bits", "start"],
)
def test_contradicting_metadata_is_refused(
    blobs: tuple[Path, dict[str, int]], tmp_path: Path, place: int, replacement: bytes, message: str
) -> None:
    path, offsets = blobs
    content = bytearray(path.read_bytes())
    start = offsets["fp32"] + place
    content[start : start + len(replacement)] = replacement
    (tmp_path / "weight.bin").write_bytes(content)
    with pytest.raises(PackageError, match=message):
        BlobFile(tmp_path / "weight.bin").value(TensorType("w", "fp32", SHAPE), offsets["fp32"])


@pytest.mark.parametrize(
    "content", [b"", b"\1\0\0\0\2\0\0\0", b"\1\0\0\0\3" + bytes(59)], ids=["empty", "cut", "version"]
)
def test_file_without_a_valid_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"weight\.bin"):
        BlobFile(path)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_file_is_read_or_raises_one_error(
    blobs: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source, offsets = blobs
    content = bytearray(source.read_bytes())
    dtype = data.draw(st.sampled_from(DTYPES))
    for _ in range(data.draw(st.integers(1, 6))):  # mostly in the header and the metadata
        near = data.draw(st.sampled_from([0, offsets[dtype], data.draw(st.sampled_from(sorted(offsets.values())))]))
        content[near + data.draw(st.integers(0, 63))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    length = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[:length])
    try:
        array = BlobFile(path).value(TensorType("w", dtype, SHAPE), offsets[dtype]).array()
    except PackageError as error:
        assert "\n" not in str(error)
        return
    assert array.shape == SHAPE
