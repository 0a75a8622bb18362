"""A checkpoint with a LoRA adapter, or a part that was trained alone, merged into it tensor by tensor as they are read.

A merged tensor is W + scale * B A. Tensors that were trained in full replace the checkpoint's. `adapter_files.py` has
the layouts of the folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapter_files import CONFIG, TABLE, AdapterFiles, open_adapter, part_of
from .checkpoint import FLOAT_DTYPES, HEAD, WIDE, Checkpoint, check_not_empty, settle_tied_embeddings
from .config import FastVLMConfig
from .errors import AdapterError, listed
from .files import combined_sha256
from .safetensors_files import TensorInfo, read_header
from .source_layouts import Framework
from .tokenizer_files import largest_token_id


@dataclass(frozen=True)
class Source:
    """A tensor of the adapter, in its file."""

    file: Path
    name: str
    info: TensorInfo
    """Its shape and dtype, with the axes of PEFT."""
    transposed: bool = False


@dataclass(frozen=True)
class Change:
    """The change of one of the checkpoint's tensors."""

    whole: Source | None = None
    """The replacement to which the factors are added."""
    a: Source | None = None
    b: Source | None = None
    embedding: bool = False
    scale: float = 1.0


class AdaptedCheckpoint:
    """A checkpoint with an adapter merged into it. Changed tensors are float32. Implements `Checkpoint`.

    A table of embeddings with another number of rows is taken if the tokenizer, the adapter's own if it has one, has
    no id past them.

    Raises:
        AdapterError: the folder is not a LoRA adapter, belongs to another checkpoint, or has an unused tensor.
        WeightsError: a pickle cannot be read.
    """

    def __init__(self, base: Checkpoint, folder: Path, *, allow_pickle: bool = False) -> None:
        self._base, self._folder = base, folder
        self.name = f"{base.name}+{folder.resolve().name}"
        self._adapter = open_adapter(folder, allow_pickle)
        self._changes = _changes(base, folder, self._adapter)
        self._tokenizer_files = _tokenizer_files(base, folder)
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)
        for name, change in self._changes.items():
            shape = change.whole.info.shape if change.whole else base.tensors[name].shape
            self.tensors[name] = TensorInfo(shape, "F32")
        self.config_dict: Mapping[str, Any] = base.config_dict
        self.config: FastVLMConfig = base.config
        self.notes = (*base.notes, *self._adapter.notes, *self._resized_notes())
        if HEAD in self._changes or TABLE in self._changes:
            config, notes = settle_tied_embeddings(base.config, base.config_dict, self.tensors, self.read)
            self.config, self.notes = config, (*self.notes, *notes)

    def read(self, name: str, framework: Framework) -> Any:
        """Returns the tensor `name`, merged if the adapter changes it."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, framework)
        return self._merged(name, change)

    def digest(self) -> str:
        """Returns a sha256 over the base and the adapter's files, in hex."""
        config = self._folder / CONFIG
        files = [*([config] if config.is_file() else []), *sorted(self._adapter.files, key=lambda file: file.name)]
        return hashlib.sha256(f"{self._base.digest()}/{combined_sha256(files)}".encode()).hexdigest()

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Returns the adapter's tokenizer files if it has them, else the base's."""
        return self._tokenizer_files

    def _merged(self, name: str, change: Change) -> Any:
        """Returns the changed tensor as a float32 numpy array, summed in float64."""
        import torch

        base = _float64(change.whole) if change.whole else torch.as_tensor(self._base.read(name, "pt")).double()
        if change.a is not None and change.b is not None:
            a, b = _float64(change.a), _float64(change.b)
            delta = (b @ a).T if change.embedding else b.flatten(1) @ a.flatten(1)
            base = base + change.scale * delta.reshape(base.shape)
        return base.float().numpy()

    def _resized_notes(self) -> tuple[str, ...]:
        """Returns a note about a resized vocabulary. Raises AdapterError if it does not fit the tokenizer."""
        before, after = self._base.tensors[TABLE].shape[0], self.tensors[TABLE].shape[0]
        head = self.tensors.get(HEAD, self.tensors[TABLE]).shape[0]
        if before == after == head:
            return ()
        largest = largest_token_id(self._tokenizer_files)
        if head != after or largest >= after:
            raise AdapterError(
                f"{self._folder}: the resized vocabulary must fit the tokenizer (got embeddings of {after} rows, a "
                f"head of {head}, and ids up to {largest}). Pass the adapter's folder with its tokenizer.json."
            )
        return (f"the adapter resizes the vocabulary from {before} to {after} rows",)


def _tokenizer_files(base: Checkpoint, folder: Path) -> Mapping[str, bytes]:
    """Returns the tokenizer files that trainers save with an adapter, or the base's."""
    files = base.tokenizer_files()
    if not (folder / "tokenizer.json").is_file():
        return files
    from .checkpoint import read_tokenizer_files

    own = read_tokenizer_files(folder)
    template = {"chat_template.jinja": files["chat_template.jinja"]} if "chat_template.jinja" in files else {}
    return own if b"chat_template" in own.get("tokenizer_config.json", b"") else {**template, **own}


def _float64(source: Source) -> Any:
    from safetensors import safe_open

    with safe_open(source.file, framework="pt") as stream:
        tensor = stream.get_tensor(source.name).double()
    return tensor.T if source.transposed else tensor


def _changes(base: Checkpoint, folder: Path, adapter: AdapterFiles) -> dict[str, Change]:
    """Returns the change of each tensor. Raises AdapterError for unused tensors."""
    targets = {*base.tensors, HEAD}
    changes: dict[str, Change] = {}
    unused = []
    for file in adapter.files:
        header = read_header(file)
        check_not_empty(str(folder), header)
        for name, info in header.items():
            part = part_of(name, info, targets)
            if part is None or info.dtype not in (*FLOAT_DTYPES, WIDE):
                unused.append(name)
                continue
            shape = tuple(reversed(info.shape)) if part.transposed else info.shape
            source = Source(file, name, TensorInfo(shape, info.dtype), part.transposed)
            changes[part.target] = _with(changes.get(part.target, Change()), part.kind, source)
    if unused:
        raise AdapterError(
            f"{folder}: {len(unused)} tensors do not belong to {base.name}: {listed(sorted(unused))}. Does the "
            "adapter belong to another model?"
        )
    if not changes:
        raise AdapterError(f"{folder} has nothing to merge: its weights are missing or empty")
    return {name: _checked(base, name, change, adapter) for name, change in changes.items()}


def _with(change: Change, kind: str, source: Source) -> Change:
    if kind == "whole":
        return replace(change, whole=source)
    part = {"a": source} if kind.endswith("A") else {"b": source}
    return replace(change, **part, embedding=kind.startswith("embedding"))  # type: ignore[arg-type]


def _checked(base: Checkpoint, name: str, change: Change, adapter: AdapterFiles) -> Change:
    """Returns `change` with its scale. Raises AdapterError for wrong shapes, a missing factor or a wrong rank."""
    info = base.tensors.get(name) or base.tensors[TABLE]  # a new head
    resizable = name in (TABLE, HEAD) and change.a is None and change.b is None
    if change.whole and change.whole.info.shape[resizable:] != info.shape[resizable:]:
        raise AdapterError(
            f"the adapter's {name} must have the checkpoint's shape {list(info.shape)}, got "
            f"{list(change.whole.info.shape)}. Another model size cannot be merged."
        )
    if change.a is None and change.b is None:
        return change
    if change.a is None or change.b is None:
        raise AdapterError(f"the adapter has one of two factors for {name}. Download it again.")
    if name not in base.tensors:
        raise AdapterError(f"the adapter has factors for {name}, which the checkpoint ties to its embeddings")
    a, b = change.a.info.shape, change.b.info.shape
    fits = len(a) > 1 and len(b) > 1 and a[0] == b[1] and math.prod(a[1:]) * b[0] == math.prod(info.shape)
    rows, columns = (a[1], b[0]) if change.embedding and fits else (b[0] if b else 0, math.prod(a[1:]))
    if not fits or (rows, columns) != (info.shape[0], math.prod(info.shape[1:])):
        raise AdapterError(
            f"the adapter's factors of {name} must multiply to shape {list(info.shape)}, got {list(b)} and {list(a)}"
        )
    return replace(change, scale=adapter.scale(name.rpartition(".")[0], rank=a[0]))
