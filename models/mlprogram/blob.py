"""A reader of MIL blob storage, version 2: the `weights/weight.bin` of a `.mlpackage`.

    file   64-byte header {uint32 entries, uint32 version, zeros}, then entries, each part aligned to 64 bytes
    entry  64-byte metadata {uint32 sentinel, uint32 type, uint64 bytes, uint64 start of the data,
           uint64 unused bits at the end of the last byte, zeros}, then the data

All numbers are little-endian. The program refers to an entry by the offset of its metadata.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ..errors import PackageError
from ..files import is_file
from .program import BITS, TensorType, Value

_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")
_SENTINEL = 0xDEADBEEF
_VERSION = 2

_TYPE_CODES = {
    "fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9, "uint2": 10,
    "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15,
}  # fmt: skip


class BlobFile:
    """A memory-mapped blob file. Opening it checks the header and reads nothing else.

    Raises:
        PackageError: the file is not a regular file, is too short, or has another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise PackageError(f"{path!s:.400}: this file with the weights is missing. Copy the whole package.")
        try:
            self._bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise PackageError(f"{path}: cannot be memory-mapped ({error})") from error
        if self._bytes.size < _HEADER.size:
            raise self._error(f"must have a header of {_HEADER.size} bytes, got {self._bytes.size} bytes in total")
        _, version = _HEADER.unpack_from(self._bytes.data)
        if version != _VERSION:
            raise self._error(f"blob storage version must be {_VERSION}, got {version}")

    def value(self, type: TensorType, offset: int) -> Value:
        """Returns the entry whose metadata starts at `offset` (bytes) as a lazy value of `type`.

        Raises:
            PackageError: the entry is missing, truncated, or has another type or size than `type`.
        """
        if offset + _METADATA.size > self._bytes.size:
            raise self._error(f"the entry of {type.name} must be at {offset}, got only {self._bytes.size} bytes")
        sentinel, code, size, start, unused_bits = _METADATA.unpack_from(self._bytes.data, offset)
        if sentinel != _SENTINEL:
            raise self._error(f"the sentinel of {type.name} at {offset} must be {_SENTINEL:#x}, got {sentinel:#x}")
        if code != _TYPE_CODES.get(type.dtype):
            raise self._error(f"{type.name} must be of type {type} ({_TYPE_CODES.get(type.dtype)}), got {code}")
        if size != type.nbytes or unused_bits != size * 8 - type.elements * BITS[type.dtype]:
            raise self._error(
                f"{type.name} {type} must have {type.nbytes} bytes, got {size} with {unused_bits} unused bits"
            )
        if start + size > self._bytes.size:
            raise self._error(f"{type.name} must end at byte {start + size}, got only {self._bytes.size} bytes")
        return Value(type, self._bytes[start : start + size], offset)

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.path}: {problem}")
