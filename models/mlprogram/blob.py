"""Reader of MIL blob storage, version 2: the `weights/weight.bin` of a `.mlpackage`.

    file   64-byte header {uint32 entries, uint32 version, zeros}, then entries, each part aligned to 64 bytes
    entry  64-byte metadata {uint32 sentinel, uint32 type, uint64 bytes, uint64 where the data starts,
           uint64 unused bits at the end of the last byte, zeros}, then the data

All little-endian. The program names an entry by the offset of its metadata.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ..errors import PackageError
from ..paths import is_file
from .program import BITS, TensorType, Value

_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_REEXPORT = "export the model again"

_TYPE_CODES = {
    "fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9, "uint2": 10,
    "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15,
}  # fmt: skip


class BlobFile:
    """A memory-mapped blob file. Opening it checks the header; nothing else is read before it is asked for.

    Raises:
        PackageError: not a regular file, too short, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise PackageError(
                f"{path!s:.400}: the program keeps weights in this file, and it is missing; copy the whole package"
            )
        try:
            self._bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise PackageError(f"{path}: cannot be mapped ({error}); {_REEXPORT}") from error
        if self._bytes.size < _HEADER.size:
            raise self._error(f"expected a header of {_HEADER.size} bytes, found {self._bytes.size} in all")
        _, version = _HEADER.unpack_from(self._bytes.data)
        if version != _VERSION:
            raise self._error(f"expected blob storage version {_VERSION}, found {version}")

    def value(self, type: TensorType, offset: int) -> Value:
        """Return the entry whose metadata starts at `offset` (bytes) as a lazy value of `type`.

        Raises:
            PackageError: the entry is not there, is cut off, or holds another type or size than `type` says.
        """
        if offset + _METADATA.size > self._bytes.size:
            raise self._error(f"expected the entry of {type.name} at {offset}, found only {self._bytes.size} bytes")
        sentinel, code, size, start, unused_bits = _METADATA.unpack_from(self._bytes.data, offset)
        if sentinel != _SENTINEL:
            raise self._error(f"expected {_SENTINEL:#x} at {offset} for {type.name}, found {sentinel:#x}")
        if code != _TYPE_CODES.get(type.dtype):
            raise self._error(f"expected type {type} ({_TYPE_CODES.get(type.dtype)}) for {type.name}, found {code}")
        if size != type.nbytes or unused_bits != size * 8 - type.elements * BITS[type.dtype]:
            raise self._error(
                f"expected {type.nbytes} bytes for {type.name} {type}, found {size} less {unused_bits} bits"
            )
        if start + size > self._bytes.size:
            raise self._error(f"expected {type.name} up to byte {start + size}, found only {self._bytes.size} bytes")
        return Value(type, self._bytes[start : start + size], offset)

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.path}: {problem}; {_REEXPORT}")
