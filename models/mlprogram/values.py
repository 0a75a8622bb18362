"""Protobuf types and values of MIL -> `TensorType` and `Value`. Nothing in the message is trusted."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from ..errors import PackageError
from .program import BITS, FLEXIBLE, NUMPY_TYPES, TensorType, Value
from .spec import data_types

BlobReader = Callable[[str, TensorType, int], Value]
"""(file name as the program writes it, type, offset) -> value."""

_NAMES = {"STRING": "string", "BOOL": "bool", "FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}
_FIELDS = {"string": "strings", "bool": "bools", "fp32": "floats", "fp64": "doubles"}
_FIELDS |= {"int16": "ints", "uint16": "ints", "int32": "ints", "int64": "longInts", "uint64": "longInts"}
_MAX_RANK = 16
_MAX_CHARACTERS = 1 << 20
_MAX_ELEMENTS = 1 << 48  # numpy cannot even describe shapes far above this


def decode_type(name: str, message: Any) -> TensorType:
    """Return the type of `name` from a protobuf `ValueType`.

    Raises:
        PackageError: not a tensor, an unknown data type, or a rank that disagrees with the dimensions.
    """
    what = message.WhichOneof("type")
    if what != "tensorType":
        raise PackageError(
            f"{name}: expected a tensor, found {what or 'no type'}; only programs on tensors can be read"
        )
    tensor = message.tensorType
    number = data_types().get(tensor.dataType, str(tensor.dataType))
    dtype = _NAMES.get(number, number.lower())
    if dtype not in NUMPY_TYPES:
        raise PackageError(f"{name}: data type {number} is not supported; expected one of {', '.join(NUMPY_TYPES)}")
    if tensor.rank != len(tensor.dimensions) or tensor.rank > _MAX_RANK:
        raise PackageError(
            f"{name}: expected {tensor.rank} dimensions (at most {_MAX_RANK}), found {len(tensor.dimensions)}"
        )
    shape = tuple(_size(dimension) for dimension in tensor.dimensions)
    if prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise PackageError(f"{name}: expected a shape of at most 2^48 elements, found {shape}; export the model again")
    return TensorType(name, dtype, shape)


def decode_value(name: str, message: Any, read_blob: BlobReader) -> Value:
    """Return the constant `name` from a protobuf `Value`; `read_blob` fetches those kept in a file.

    Raises:
        PackageError: the type, the number of elements or their range is not what the message itself declares.
    """
    type = decode_type(name, message.type)
    if not type.is_fixed:
        raise PackageError(f"{name}: expected a constant of a fixed shape, found {type}; export the model again")
    if message.WhichOneof("value") == "blobFileValue":
        return read_blob(message.blobFileValue.fileName, type, message.blobFileValue.offset)
    if message.immediateValue.WhichOneof("value") != "tensor":
        raise PackageError(f"{name}: expected a tensor value, found {message.immediateValue.WhichOneof('value')}")
    return Value(type, _immediate(type, message.immediateValue.tensor))


def _size(dimension: Any) -> int:
    return dimension.constant.size if dimension.WhichOneof("dimension") == "constant" else FLEXIBLE


def _immediate(type: TensorType, tensor: Any) -> np.ndarray:
    field = _FIELDS.get(type.dtype, "bytes")
    found = tensor.WhichOneof("value") or field  # an empty tensor may leave the field out
    if found != field:
        raise PackageError(f"{type.name}: expected {type} in field {field}, found {found}; export the model again")
    values = getattr(tensor, field).values
    expected = type.nbytes if field == "bytes" else type.elements
    if len(values) != expected:
        raise PackageError(
            f"{type.name}: expected {expected} {field} for {type}, found {len(values)}; export the model again"
        )
    if field == "bytes":
        return np.frombuffer(values, dtype=np.uint8)
    if field == "strings":
        if type.elements * max(map(len, values), default=0) > _MAX_CHARACTERS:  # numpy gives each the longest's room
            raise PackageError(f"{type.name}: expected at most {_MAX_CHARACTERS} characters of text, found more")
        return np.array(list(values), dtype=np.str_).reshape(type.shape)
    return _numbers(type, values)


def _numbers(type: TensorType, values: Any) -> np.ndarray:
    wide = np.array(list(values), dtype=np.int64 if type.dtype in BITS and "int" in type.dtype else None)
    array = wide.astype(NUMPY_TYPES[type.dtype])
    if "int" in type.dtype and type.dtype != "uint64" and not np.array_equal(array, wide):
        raise PackageError(
            f"{type.name}: expected values in the range of {type.dtype}, found {wide.min()}..{wide.max()}"
        )
    array.flags.writeable = False
    return array.reshape(type.shape)
