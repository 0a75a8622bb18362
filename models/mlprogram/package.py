"""A `.mlpackage` on disk -> `Program`. Everything in the package is untrusted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from ..errors import PackageError
from ..paths import is_file
from .blob import BlobFile
from .program import Argument, Operation, Program, TensorType, Value
from .spec import model_class
from .values import BlobReader, decode_type, decode_value

_MAX_MANIFEST_BYTES = 1 << 20
_MAX_MODEL_BYTES = 1 << 24  # a program without its weights is under 1 MB for FastViTHD
_MAX_OPERATIONS = 20_000  # some 2,000 for FastViTHD, constants included
_MODEL_PREFIX = "@model_path/"
_WHAT_TO_DO = "export the model again"


def read_package(path: str | Path) -> Program:
    """Describe the ML Program saved in the folder `path`; weights stay on disk until they are used.

    Raises:
        PackageError: not a package, incomplete, damaged, or not an ML Program with one function `main`.
        MachineError: coremltools is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise PackageError(
            f"{path}: expected the folder of a .mlpackage, found {'a file' if path.exists() else 'nothing'}"
        )
    if path.suffix == ".mlmodelc" or (path / "coremldata.bin").exists():
        raise PackageError(
            f"{path}: this is a compiled model, which only Core ML reads; give the .mlpackage it came from"
        )
    root = path.resolve()
    model_path = _root_model(root)
    model = _parse(model_path)
    return _Reader(root, model_path, model).program(path)


def _root_model(root: Path) -> Path:
    manifest = _read_manifest(root / "Manifest.json")
    try:
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (KeyError, TypeError) as error:
        raise PackageError(f"{root}/Manifest.json: names no root model; {_WHAT_TO_DO}") from error
    if not isinstance(item, str):
        raise PackageError(f"{root}/Manifest.json: expected a path for the root model, found {item!r}; {_WHAT_TO_DO}")
    return _inside(root, root / "Data", item)


def _read_manifest(path: Path) -> Any:
    if not path.is_file():
        raise PackageError(f"{path.parent}: expected a .mlpackage with Manifest.json, found none; {_WHAT_TO_DO}")
    data = _read_bytes(path, _MAX_MANIFEST_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path}: is not JSON ({str(error)[:80]}); {_WHAT_TO_DO}") from error


def _parse(path: Path) -> Any:
    if not is_file(path):
        raise PackageError(
            f"{path!s:.400}: the manifest names this model file, and it is missing; copy the whole package"
        )
    message = model_class()()
    try:
        message.ParseFromString(_read_bytes(path, _MAX_MODEL_BYTES))
    except DecodeError as error:
        raise PackageError(f"{path}: is cut off or not a Core ML model; {_WHAT_TO_DO}") from error
    found = message.WhichOneof("Type")
    if found != "mlProgram":
        raise PackageError(
            f"{path}: expected an mlProgram, found {found}; convert with minimum_deployment_target iOS16 or later"
        )
    return message


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise PackageError(f"{path}: expected at most {limit} bytes, found {size}; {_WHAT_TO_DO}")
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _inside(root: Path, base: Path, relative: str) -> Path:
    """Return `base / relative` resolved, refusing what lies outside the package."""
    if not relative.isprintable():
        raise PackageError(f"{root}: {relative!r} is not a usable path; {_WHAT_TO_DO}")
    try:
        target = (base / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links
        raise PackageError(f"{root}: {relative!r} is not a usable path ({error}); {_WHAT_TO_DO}") from error
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not target.is_relative_to(root):
        raise PackageError(f"{root}: expected a path inside the package, found {relative!r}; do not trust this package")
    return target


class _Reader:
    """Turns the parsed model into a `Program`, and checks the graph on the way."""

    def __init__(self, root: Path, model_path: Path, model: Any) -> None:
        self.root = root
        self.folder = model_path.parent
        self.model = model
        self.blobs: dict[str, BlobFile] = {}
        self.known: dict[str, TensorType] = {}

    def program(self, path: Path) -> Program:
        function = self._main()
        block = function.block_specializations[function.opset]
        if len(block.operations) > _MAX_OPERATIONS:
            raise self._error(f"expected at most {_MAX_OPERATIONS} operations, found {len(block.operations)}")
        inputs = tuple(self._define(item) for item in function.inputs)
        operations = tuple(self._operation(item) for item in block.operations)
        outputs = tuple(self._lookup(name, "the outputs") for name in block.outputs)
        description = self.model.description
        self._check_interface("input", description.input, inputs)
        self._check_interface("output", description.output, outputs)
        return Program(
            inputs=inputs,
            outputs=outputs,
            operations=operations,
            spec_version=self.model.specificationVersion,
            opset=function.opset,
            metadata=_metadata(description.metadata),
            path=path,
            image_inputs={item.name: _colour_layout(item) for item in description.input if _colour_layout(item)},
        )

    def _main(self) -> Any:
        functions = self.model.mlProgram.functions
        if list(functions) != ["main"]:
            raise self._error(f"expected one function, main, found {sorted(functions)}")
        main = functions["main"]
        if main.opset not in main.block_specializations:
            raise self._error(f"expected a block for opset {main.opset!r}, found {sorted(main.block_specializations)}")
        return main

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
                f"operation {name} ({message.type}) has inner blocks; only straight-line programs can be read"
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
        read_blob: BlobReader = self._blob
        return decode_value(name, message, read_blob)

    def _blob(self, file_name: str, type: TensorType, offset: int) -> Value:
        if file_name not in self.blobs:
            if not file_name.startswith(_MODEL_PREFIX):
                raise self._error(f"expected weights of {type.name} under {_MODEL_PREFIX}, found {file_name!r}")
            self.blobs[file_name] = BlobFile(_inside(self.root, self.folder, file_name.removeprefix(_MODEL_PREFIX)))
        return self.blobs[file_name].value(type, offset)

    def _define(self, message: Any) -> TensorType:
        self._check_text(message.name)
        if message.name in self.known:
            raise self._error(f"expected every result to have a name of its own, found {message.name!r} twice")
        self.known[message.name] = decode_type(message.name, message.type)
        return self.known[message.name]

    def _lookup(self, name: str, reader: str) -> TensorType:
        if name not in self.known:
            raise self._error(f"{reader}: reads {name!r}, which nothing before it computes")
        return self.known[name]

    def _check_text(self, text: str) -> None:
        if not text.isprintable():  # names go into messages of one line
            raise self._error(f"expected names of printable characters, found {text!r}")

    def _check_interface(self, side: str, described: Iterable[Any], actual: tuple[TensorType, ...]) -> None:
        expected, found = sorted(item.name for item in described), sorted(tensor.name for tensor in actual)
        if expected != found:
            raise self._error(f"the description has {side}s {expected}, the program {found}")

    def _error(self, problem: str) -> PackageError:
        return PackageError(f"{self.root}: {problem}; {_WHAT_TO_DO}")


def _metadata(message: Any) -> dict[str, str]:
    texts = {"shortDescription": message.shortDescription, "versionString": message.versionString}
    texts |= {"author": message.author, "license": message.license}
    return {**{key: text for key, text in texts.items() if text}, **dict(message.userDefined)}


def _colour_layout(feature: Any) -> str:
    if feature.type.WhichOneof("Type") != "imageType":
        return ""
    image = feature.type.imageType
    return image.DESCRIPTOR.fields_by_name["colorSpace"].enum_type.values_by_number[image.colorSpace].name
