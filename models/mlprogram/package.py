"""Reads a `.mlpackage` folder into a `Program`. Everything in the package is untrusted.

The protobuf classes are coremltools' generated ones, loaded without importing coremltools: `import coremltools` takes
4 to 5 s and prints warnings, and the generated modules alone take 30 ms. They only import each other relatively, so
they load under an alias package whose search path is `coremltools/proto`. protobuf keys message classes by descriptor.
An import of coremltools, earlier or later, therefore yields the same `Model` class.

`weights/weight.bin` is MIL blob storage, version 2:

    file   64-byte header {uint32 entries, uint32 version, zeros}, then entries, each part aligned to 64 bytes
    entry  64-byte metadata {uint32 sentinel, uint32 type, uint64 bytes, uint64 start of the data,
           uint64 unused bits at the end of the last byte, zeros}, then the data

Before coremltools 8 everything after the start was reserved and not initialized: it has any values. Unused bits
belong to the types below one byte, which came with coremltools 8, and are not read for other types. (Apple's
`mlmodel/src/MILBlob/Blob/StorageFormat.hpp` says both.) Reserved words are never read.

All numbers are little-endian. The program refers to an entry by the offset of its metadata.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import struct
import sys
import types
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from ..errors import MachineError, PackageError
from ..files import is_file
from ..foreign_files import foreign_file
from .program import BITS, FLEXIBLE, NUMPY_TYPES, Argument, Feature, Operation, Program, TensorType, Value

MAX_MANIFEST_BYTES = 1 << 20
"""The largest Manifest.json that is read, in bytes. Core ML's takes under 1 kB."""
MAX_MODEL_BYTES = 1 << 24
"""The largest program that is read, in bytes. FastViTHD's takes under 1 MB without its weights."""
MAX_OPERATIONS = 20_000
"""The highest number of operations. FastViTHD has about 2,000, constants included."""
MAX_RANK = 16
"""The highest rank of a tensor. Core ML itself allows 5."""
MAX_CHARACTERS = 1 << 20
"""The highest number of characters in a string tensor, because numpy pads each string to the longest one."""
MAX_ELEMENTS = 1 << 48
"""The highest number of elements of a tensor. numpy cannot describe shapes far above this."""

_MODEL_PREFIX = "@model_path/"
_ALIAS = f"{__package__}._coremltools_proto"
_INSTALL = "Reinstall it with `pip install coremltools==9.0`."

_DTYPES = {"STRING": "string", "BOOL": "bool", "FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}
_FIELDS = {"string": "strings", "bool": "bools", "fp32": "floats", "fp64": "doubles"}
_FIELDS |= {"int16": "ints", "uint16": "ints", "int32": "ints", "int64": "longInts", "uint64": "longInts"}

BlobReader = Callable[[str, TensorType, int], Value]
"""(file name as the program writes it, type, offset in bytes) -> value."""


def read_package(path: str | Path, function_name: str | None = None) -> Program:
    """Returns a function of the ML Program saved in the folder `path`. Weights stay on disk until they are used.

    The default is the package's own default function, `main` in nearly all packages.

    Raises:
        PackageError: the folder is not a package, is incomplete or damaged, or has no ML Program or no such function.
        MachineError: coremltools is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise PackageError(f"{path}: must be a .mlpackage folder, got {'a file' if path.exists() else 'nothing'}")
    if path.suffix == ".mlmodelc" or (path / "coremldata.bin").exists():
        raise PackageError(
            f"{path}: this is a compiled model, which only Core ML reads. Pass the .mlpackage it was compiled from."
        )
    root = path.resolve()
    model_path = _root_model(root)
    model = _parse(model_path)
    return _Reader(root, model_path, model).program(path, function_name)


def model_class() -> Any:
    """Returns the protobuf message class `Model` (`CoreML.Specification.Model`).

    Raises:
        MachineError: coremltools is not installed, or its generated modules cannot be loaded.
    """
    return _generated("Model_pb2").Model


@cache
def _data_types() -> dict[int, str]:
    """Returns the names of the MIL data types by their number in the protobuf (10 -> "FLOAT16")."""
    return {number: name for name, number in _generated("MIL_pb2").DataType.items()}


def _generated(module: str) -> types.ModuleType:
    if _ALIAS not in sys.modules:
        alias = types.ModuleType(_ALIAS)
        alias.__path__ = [str(_proto_folder())]
        sys.modules[_ALIAS] = alias
    try:
        return importlib.import_module(f"{_ALIAS}.{module}")
    # protobuf raises TypeError when its runtime and the generated code disagree
    except (ImportError, TypeError) as error:
        raise MachineError(f"coremltools' protobuf classes cannot be loaded ({error}). {_INSTALL}") from error


def _proto_folder() -> Path:
    found = importlib.machinery.PathFinder.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        raise MachineError(f"coremltools is needed to read a .mlpackage and was not found. {_INSTALL}")
    return Path(next(iter(found.submodule_search_locations))) / "proto"


def _root_model(root: Path) -> Path:
    manifest = _read_manifest(root / "Manifest.json")
    try:
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError) as error:
        raise PackageError(f"{root}/Manifest.json: has no entry for the root model") from error
    if not isinstance(item, str):
        raise PackageError(f"{root}/Manifest.json: the root model must be a path, got {item!r}")
    return _inside(root, root / "Data", item)


def _read_manifest(path: Path) -> Any:
    if not path.is_file():
        raise PackageError(f"{path.parent}: must be a .mlpackage with a Manifest.json, got none")
    data = _read_bytes(path, MAX_MANIFEST_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        _refuse_foreign(path)
        raise PackageError(f"{path}: must be JSON, got invalid text ({str(error)[:80]})") from error


def _refuse_foreign(path: Path) -> None:
    """Raises PackageError if a file of a package is a git-lfs pointer, a web page or the like."""
    if foreign := foreign_file(path):
        raise PackageError(f"{path} is {foreign}")


def _parse(path: Path) -> Any:
    if not is_file(path):
        raise PackageError(f"{path!s:.400}: the model file in the manifest is missing. Copy the whole package.")
    message = model_class()()
    try:
        message.ParseFromString(_read_bytes(path, MAX_MODEL_BYTES))
    except DecodeError as error:
        _refuse_foreign(path)
        raise PackageError(f"{path}: is truncated or not a Core ML model") from error
    found = message.WhichOneof("Type")
    if found != "mlProgram":
        raise PackageError(f"{path}: must be an mlProgram, got {found}. {_OTHER_TYPES.get(found, _OLD_TYPE)}")
    return message


_OLD_TYPE = "Convert the model with convert_to='mlprogram', from its source."
_OTHER_TYPES = {
    **dict.fromkeys(
        ("pipeline", "pipelineClassifier", "pipelineRegressor"), "A pipeline cannot be run: pass one of its models."
    ),
    "neuralNetwork": f"This is the older neural network format. {_OLD_TYPE}",
    "neuralNetworkClassifier": f"This is the older neural network format. {_OLD_TYPE}",
}
"""The advice for models that are not ML Programs, by type."""


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise PackageError(f"{path}: must have at most {limit} bytes, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error


def _inside(root: Path, base: Path, relative: str) -> Path:
    """Returns `base / relative` resolved, and refuses paths that leave the package."""
    if not relative.isprintable():
        raise PackageError(f"{root}: {relative!r} is not a usable path")
    try:
        target = (base / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links
        raise PackageError(f"{root}: {relative!r} is not a usable path ({error})") from error
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not target.is_relative_to(root):
        raise PackageError(f"{root}: must only have paths inside the package, got {relative!r}. Do not trust it.")
    return target


class _Reader:
    """Converts the parsed model into a `Program` and checks the graph on the way."""

    def __init__(self, root: Path, model_path: Path, model: Any) -> None:
        self.root = root
        self.folder = model_path.parent
        self.model = model
        self.blobs: dict[str, BlobFile] = {}
        self.known: dict[str, TensorType] = {}

    def program(self, path: Path, function_name: str | None) -> Program:
        name, description = self._function(function_name)
        function = self.model.mlProgram.functions[name]
        if function.opset not in function.block_specializations:
            raise self._error(
                f"must have a block for opset {function.opset!r}, got {sorted(function.block_specializations)}"
            )
        block = function.block_specializations[function.opset]
        if len(block.operations) > MAX_OPERATIONS:
            raise self._error(f"must have at most {MAX_OPERATIONS} operations, got {len(block.operations)}")
        parameters = [(item.type.WhichOneof("type"), self._define(item)) for item in function.inputs]
        inputs = tuple(tensor for kind, tensor in parameters if kind != "stateType")
        operations = tuple(self._operation(item) for item in block.operations)
        outputs = tuple(self._lookup(name, "the outputs") for name in block.outputs)
        self._check_interface("input", description.input, inputs)
        self._check_interface("output", description.output, outputs)
        features = {item.name: _feature(item) for item in (*description.input, *description.output)}
        return Program(
            inputs=inputs,
            outputs=outputs,
            operations=operations,
            spec_version=self.model.specificationVersion,
            opset=function.opset,
            metadata=_metadata(self.model.description.metadata),
            path=path,
            image_inputs={tensor.name: features[tensor.name].color for tensor in inputs if features[tensor.name].color},
            states=tuple(tensor for kind, tensor in parameters if kind == "stateType"),
            features=features,
            functions=tuple(sorted(self.model.mlProgram.functions)),
        )

    def _function(self, wanted: str | None) -> tuple[str, Any]:
        """Returns the name of the wanted or default function, and its description."""
        names, description = sorted(self.model.mlProgram.functions), self.model.description
        name = wanted or description.defaultFunctionName or ("main" if "main" in names or len(names) != 1 else names[0])
        if name not in names:
            raise PackageError(
                f"{self.root}: function_name must be one of {', '.join(names)} (got {name!r})", "function_name"
            )
        described = {item.name: item for item in description.functions}
        return name, described.get(name, description)

    def _operation(self, message: Any) -> Operation:
        for text in (message.type, *message.inputs, *message.attributes, *(output.name for output in message.outputs)):
            self._check_text(text)
        name = message.outputs[0].name if message.outputs else message.type
        if "name" in message.attributes:
            label = self._value(f"{name}.name", message.attributes["name"])
            name = str(label.array()) if label.type.dtype == "string" else name
            self._check_text(name)
        if message.blocks:
            raise self._error(
                f"operation {name} ({message.type}) has inner blocks. Only programs without loops and branches can be "
                "read. Run this one with Core ML on a Mac."
            )
        inputs = {key: self._arguments(f"{name}.{key}", item.arguments) for key, item in message.inputs.items()}
        attributes = {k: self._value(f"{name}.{k}", v) for k, v in message.attributes.items() if k != "name"}
        return Operation(message.type, name, inputs, attributes, tuple(self._define(item) for item in message.outputs))

    def _arguments(self, name: str, bindings: Iterable[Any]) -> tuple[Argument, ...]:
        arguments: list[Argument] = []
        for binding in bindings:
            if binding.WhichOneof("binding") == "value":
                arguments.append(self._value(name, binding.value))
            else:
                arguments.append(self._lookup(binding.name, name).name)
        return tuple(arguments)

    def _value(self, name: str, message: Any) -> Value:
        return _decode_value(name, message, self._blob)

    def _blob(self, file_name: str, type: TensorType, offset: int) -> Value:
        if file_name not in self.blobs:
            if not file_name.startswith(_MODEL_PREFIX):
                raise self._error(f"the weights of {type.name} must be under {_MODEL_PREFIX}, got {file_name!r}")
            self.blobs[file_name] = BlobFile(_inside(self.root, self.folder, file_name.removeprefix(_MODEL_PREFIX)))
        return self.blobs[file_name].value(type, offset)

    def _define(self, message: Any) -> TensorType:
        self._check_text(message.name)
        if message.name in self.known:
            raise self._error(f"every result must have a name of its own, got {message.name!r} twice")
        self.known[message.name] = _decode_type(message.name, message.type)
        return self.known[message.name]

    def _lookup(self, name: str, reader: str) -> TensorType:
        if name not in self.known:
            raise self._error(f"{reader}: reads {name!r}, which nothing before it computes")
        return self.known[name]

    def _check_text(self, text: str) -> None:
        if not text.isprintable():  # names go into messages of one line
            raise self._error(f"names must have printable characters, got {text!r}")

    def _check_interface(self, side: str, described: Iterable[Any], actual: tuple[TensorType, ...]) -> None:
        expected, found = sorted(item.name for item in described), sorted(tensor.name for tensor in actual)
        if expected != found:
            raise self._error(f"the description has {side}s {expected}, the program {found}")

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.root}: {problem}")


def _metadata(message: Any) -> dict[str, str]:
    texts = {"shortDescription": message.shortDescription, "versionString": message.versionString}
    texts |= {"author": message.author, "license": message.license}
    return {**{key: text for key, text in texts.items() if text}, **dict(message.userDefined)}


def _feature(message: Any) -> Feature:
    """Returns the description of an input or output."""
    type = message.type
    if type.WhichOneof("Type") == "imageType":
        return _image_feature(type.imageType)
    array = type.multiArrayType
    default = array.WhichOneof("defaultOptionalValue") if type.isOptional else None
    listed_shapes = array.WhichOneof("ShapeFlexibility") == "enumeratedShapes"
    return Feature(
        bounds=tuple(map(_bounds, array.shapeRange.sizeRanges)),
        shapes=tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes) if listed_shapes else (),
        default=float(getattr(array, default)) if default else 0.0 if type.isOptional else None,
        shape=tuple(array.shape),
    )


def _image_feature(image: Any) -> Feature:
    color = image.DESCRIPTOR.fields_by_name["colorSpace"].enum_type.values_by_number[image.colorSpace].name
    flexibility = image.WhichOneof("SizeFlexibility")
    default = (image.height, image.width)
    if flexibility == "enumeratedSizes":
        sizes = tuple((size.height, size.width) for size in image.enumeratedSizes.sizes)
        return Feature(color, shapes=sizes, shape=default)
    if flexibility == "imageSizeRange":
        bounds = (_bounds(image.imageSizeRange.heightRange), _bounds(image.imageSizeRange.widthRange))
        return Feature(color, bounds, shape=default)
    return Feature(color, tuple((size, size) for size in default), shape=default)


def _bounds(limits: Any) -> tuple[int, int]:
    return limits.lowerBound, limits.upperBound if limits.upperBound >= 0 else FLEXIBLE


def _decode_type(name: str, message: Any) -> TensorType:
    """Returns the type of `name` from a protobuf `ValueType`. A state has the type of its tensor.

    A list of scalars with a fixed length, such as the labels of a classifier, is a vector. The probabilities of a
    classifier are of type "dictionary".

    Raises:
        PackageError: not a tensor, an unknown data type, or a rank that disagrees with the dimensions.
    """
    found = message.WhichOneof("type")
    if found == "stateType":
        return _decode_type(name, message.stateType.wrappedType)
    if found == "dictionaryType":
        return TensorType(name, "dictionary", ())
    if found == "listType":
        item = _decode_type(name, message.listType.type)
        return TensorType(name, item.dtype, (_size(message.listType.length), *item.shape))
    if found != "tensorType":
        raise PackageError(f"{name}: must be a tensor, got {found or 'no type'}")
    tensor = message.tensorType
    number = _data_types().get(tensor.dataType, str(tensor.dataType))
    dtype = _DTYPES.get(number, number.lower())
    if dtype not in NUMPY_TYPES:
        raise PackageError(f"{name}: data type must be one of {', '.join(NUMPY_TYPES)}, got {number}")
    if tensor.rank != len(tensor.dimensions) or tensor.rank > MAX_RANK:
        raise PackageError(
            f"{name}: must have {tensor.rank} dimensions (at most {MAX_RANK}), got {len(tensor.dimensions)}"
        )
    shape = tuple(_size(dimension) for dimension in tensor.dimensions)
    if prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise PackageError(f"{name}: must have at most 2^48 elements, got shape {shape}")
    return TensorType(name, dtype, shape)


def _size(dimension: Any) -> int:
    return dimension.constant.size if dimension.WhichOneof("dimension") == "constant" else FLEXIBLE


def _decode_value(name: str, message: Any, read_blob: BlobReader) -> Value:
    """Returns the constant `name` from a protobuf `Value`. `read_blob` gets values from the blob file.

    Raises:
        PackageError: the type, the number of elements or their range differs from the declared one.
    """
    type = _decode_type(name, message.type)
    if not type.is_fixed or type.dtype == "dictionary":
        raise PackageError(f"{name}: a constant must be a tensor of a fixed shape, got {type}")
    if message.WhichOneof("value") == "blobFileValue":
        return read_blob(message.blobFileValue.fileName, type, message.blobFileValue.offset)
    found = message.immediateValue.WhichOneof("value")
    if found == "list" and type.rank == 1:
        return Value(type, _list(type, message.immediateValue.list.values, read_blob))
    if found != "tensor":
        raise PackageError(f"{name}: must be a tensor value, got {found}")
    return Value(type, _immediate(type, message.immediateValue.tensor))


def _list(type: TensorType, values: Any, read_blob: BlobReader) -> np.ndarray:
    """Returns a list of scalars as a vector."""
    items = [_decode_value(type.name, value, read_blob) for value in values]
    if len(items) != type.elements or any((i.type.dtype, i.type.shape) != (type.dtype, ()) for i in items):
        raise PackageError(f"{type.name}: must be a list of {type.elements} scalars of {type.dtype}, got {len(items)}")
    texts = [item.array().item() for item in items]
    if type.dtype == "string" and len(texts) * max(map(len, texts), default=0) > MAX_CHARACTERS:
        raise PackageError(f"{type.name}: must have at most {MAX_CHARACTERS} characters, got more")
    return np.array(texts, dtype=np.str_ if type.dtype == "string" else NUMPY_TYPES[type.dtype])


def _immediate(type: TensorType, tensor: Any) -> np.ndarray:
    field = _FIELDS.get(type.dtype, "bytes")
    found = tensor.WhichOneof("value") or field  # an empty tensor may leave the field out
    if found != field:
        raise PackageError(f"{type.name}: {type} must be in field {field}, got {found}")
    values = getattr(tensor, field).values
    expected = type.nbytes if field == "bytes" else type.elements
    if len(values) != expected:
        raise PackageError(f"{type.name}: {type} must have {expected} {field}, got {len(values)}")
    if field == "bytes":
        return np.frombuffer(values, dtype=np.uint8)
    if field == "strings":
        if type.elements * max(map(len, values), default=0) > MAX_CHARACTERS:
            raise PackageError(f"{type.name}: must have at most {MAX_CHARACTERS} characters, got more")
        return np.array(list(values), dtype=np.str_).reshape(type.shape)
    return _numbers(type, values)


def _numbers(type: TensorType, values: Any) -> np.ndarray:
    wide = np.array(list(values), dtype=np.int64 if type.dtype in BITS and "int" in type.dtype else None)
    array = wide.astype(NUMPY_TYPES[type.dtype])
    if "int" in type.dtype and type.dtype != "uint64" and not np.array_equal(array, wide):
        raise PackageError(f"{type.name}: values must be in the range of {type.dtype}, got {wide.min()}..{wide.max()}")
    array.flags.writeable = False
    return array.reshape(type.shape)


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
            _refuse_foreign(path)
            raise self._error(f"must have a header of {_HEADER.size} bytes, got {self._bytes.size} bytes in total")
        _, version = _HEADER.unpack_from(self._bytes.data)
        if version != _VERSION:
            _refuse_foreign(path)
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
        if size != type.nbytes:
            raise self._error(f"{type.name} {type} must have {type.nbytes} bytes, got {size}")
        if BITS[type.dtype] < 8 and unused_bits != size * 8 - type.elements * BITS[type.dtype]:
            raise self._error(f"{type.name} {type} must fill {size} bytes, got {unused_bits} unused bits")
        if start + size > self._bytes.size:
            raise self._error(f"{type.name} must end at byte {start + size}, got only {self._bytes.size} bytes")
        return Value(type, self._bytes[start : start + size], offset)

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.path}: {problem}")
