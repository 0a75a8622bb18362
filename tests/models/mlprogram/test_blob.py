"""Blob storage: compared with coremltools' own writer, and damaged files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram.blob import BlobFile
from fastvlm.models.mlprogram.program import NUMPY_TYPES, TensorType

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
