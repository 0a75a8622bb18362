"""The header of a safetensors file, checked before anything that it speaks of is allocated or mapped.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the length N of the header, little-endian; N bytes of
JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` and perhaps `__metadata__`; then the data, to which
the offsets are relative, without gaps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import WeightsError
from .json_file import parse_json_object

MAX_HEADER_BYTES = 8 * 2**20
"""The header of a 7B checkpoint takes 100 kB."""

MAX_RANK = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Of one element, by safetensors' names of dtypes."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name of it: `BF16`, `F16`, `F32`, `I64` ..."""


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes in a safetensors file, in the order of their data.

    Raises:
        WeightsError: the file is missing, no regular file, truncated, longer than its header says, or the header is
            malformed or contradicts itself.
    """
    try:
        if file.exists() and not file.is_file():
            raise WeightsError(f"{file} is no regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = _header(stream.read(8), size, stream)
        values = parse_json_object(content, "its header", _HeaderError)
        return _checked(values, size - 8 - len(content))
    except FileNotFoundError:
        raise WeightsError(f"{file} does not exist") from None
    except (OSError, ValueError) as reason:  # ValueError: a name with a NUL in it
        raise WeightsError(f"{file!s:.400} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    except _HeaderError as reason:
        raise WeightsError(
            f"{file} is not a whole safetensors file ({reason}): truncated or corrupt, fetch it again"
        ) from None


class _HeaderError(WeightsError):
    """What is wrong, before it is known in which file."""


def _header(length: bytes, size: int, stream: Any) -> bytes:
    if len(length) < 8:
        raise _HeaderError(f"it has {size} bytes")
    (count,) = struct.unpack("<Q", length)
    if count > size - 8:
        raise _HeaderError(f"its header should have {count} bytes, and {size - 8} are there")
    if count > MAX_HEADER_BYTES:
        raise _HeaderError(f"its header has {count} bytes, where {MAX_HEADER_BYTES} are the most")
    content = stream.read(count)
    if len(content) != count or content[:1] != b"{":
        raise _HeaderError("its header is no JSON object")
    return content


def _checked(values: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise _HeaderError("its __metadata__ should map names to texts")
    entries = {name: _entry(name, value) for name, value in values.items()}
    order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    end = 0
    for name in order:
        if entries[name].begin != end:
            raise _HeaderError(f"{name!r:.80} begins at byte {entries[name].begin} of the data instead of {end}")
        end = entries[name].end
    if end != data_bytes:
        raise _HeaderError(f"its tensors take {end} bytes, and {data_bytes} are there")
    return {name: entries[name].info for name in order}


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{name!r:.80} should have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _HeaderError(f"{name!r:.80} has the dtype {dtype!r:.40}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _HeaderError(f"{name!r:.80} has the shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderError(f"{name!r:.80} has the data_offsets {offsets!r:.80}")
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _HeaderError(
            f"{name!r:.80} of {dtype} {shape!r:.80} takes {bits / 8:g} bytes; it has {offsets[1] - offsets[0]}"
        )
    return _Entry(TensorInfo(tuple(shape), dtype), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48 for size in values
    )
