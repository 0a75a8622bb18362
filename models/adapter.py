"""A checkpoint with a LoRA adapter of the PEFT or LLaVA layout merged into it, tensor by tensor as they are read.

W + scale * B A, with scale alpha / r, or alpha / sqrt(r) where `use_rslora` is set (LoRA, arXiv 2106.09685; rsLoRA,
arXiv 2312.03732). What the trainer trained in full replaces the checkpoint's tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapter_names import module_of, part_of
from .checkpoint import (
    FLOAT_DTYPES,
    HEAD,
    Checkpoint,
    Framework,
    TensorInfo,
    file_digest,
    read_header,
    settle_tied_embeddings,
)
from .config import FastVLMConfig
from .errors import AdapterError
from .json_file import read_json_object
from .weight_files import listed

CONFIG = "adapter_config.json"
FACTORS = "adapter_model.safetensors"
WHOLE = "non_lora_trainables.safetensors"
PICKLES = ("adapter_model.bin", "non_lora_trainables.bin")
UNKNOWN_KINDS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
)
"""Options of PEFT under which W + scale * B A is not what was trained."""
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Of `init_lora_weights`: these take out of the base what the factors begin with."""


@dataclass(frozen=True)
class Source:
    """A tensor of the adapter: where it stands."""

    file: Path
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Change:
    """What becomes of one of the checkpoint's tensors."""

    whole: Source | None = None
    """What stands in its place before factors are added."""
    a: Source | None = None
    b: Source | None = None
    embedding: bool = False
    scale: float = 1.0


class AdaptedCheckpoint:
    """A checkpoint with an adapter merged into it; changed tensors are float32. See `models.checkpoint.Checkpoint`.

    Raises:
        AdapterError: the folder is no LoRA adapter, is not for this checkpoint, or a tensor of it would go unused.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._base, self._folder = base, folder
        self.name = f"{base.name}+{folder.resolve().name}"
        settings = _settings(folder)
        self._changes, self.notes = _changes(base, folder, settings)
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)
        for name, change in self._changes.items():
            shape = change.whole.info.shape if change.whole else base.tensors[name].shape
            self.tensors[name] = TensorInfo(shape, "F32")
        self.config_dict: Mapping[str, Any] = base.config_dict
        self.config: FastVLMConfig = base.config
        self.notes = (*base.notes, *self.notes)
        if HEAD in self._changes or "model.embed_tokens.weight" in self._changes:
            config, notes = settle_tied_embeddings(base.config, base.config_dict, self.tensors, self.read)
            self.config, self.notes = config, (*self.notes, *notes)

    def read(self, name: str, framework: Framework) -> Any:
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, framework)
        return self._merged(name, change)

    def digest(self) -> str:
        files = [file for name in (CONFIG, FACTORS, WHOLE) if (file := self._folder / name).is_file()]
        return hashlib.sha256(f"{self._base.digest()}/{file_digest(files)}".encode()).hexdigest()

    def tokenizer_files(self) -> Mapping[str, bytes]:
        return self._base.tokenizer_files()

    def _merged(self, name: str, change: Change) -> Any:
        """The tensor with its change, as a float32 numpy array, summed in float64."""
        import torch

        base = _float64(change.whole) if change.whole else torch.as_tensor(self._base.read(name, "pt")).double()
        if change.a is not None and change.b is not None:
            a, b = _float64(change.a), _float64(change.b)
            delta = (b @ a).T if change.embedding else b.flatten(1) @ a.flatten(1)
            base = base + change.scale * delta.reshape(base.shape)
        return base.float().numpy()


def _float64(source: Source) -> Any:
    from safetensors import safe_open

    with safe_open(source.file, framework="pt") as stream:
        return stream.get_tensor(source.name).double()


def _settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, of an adapter that is understood whole. Raises AdapterError."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} holds no {CONFIG}, so it is no LoRA adapter; give the folder that PEFT wrote")
    for name in PICKLES:
        safe = name.replace(".bin", ".safetensors")
        if (folder / name).is_file() and not (folder / safe).is_file():
            raise AdapterError(
                f"{folder / name} is a pickle, which can run foreign code when it is opened: convert it first, with "
                f"`safetensors.torch.save_file(torch.load({name!r}, weights_only=True), {safe!r})`"
            )
    settings = read_json_object(folder / CONFIG, AdapterError)
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG}: peft_type should be 'LORA'; found {settings.get('peft_type')!r:.40}")
    odd = [key for key in UNKNOWN_KINDS if settings.get(key)]
    odd += (
        ["init_lora_weights"] if str(settings.get("init_lora_weights")).startswith(INITS_THAT_CHANGE_THE_BASE) else []
    )
    if odd:
        raise AdapterError(f"{CONFIG} sets {odd[0]}, which is not merged here: merge it with PEFT's merge_and_unload")
    return settings


def _changes(base: Checkpoint, folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Change], tuple[str, ...]]:
    """What becomes of each tensor that the adapter changes, and notes. Raises AdapterError for what has no use."""
    targets = {*base.tensors, HEAD}
    changes: dict[str, Change] = {}
    unused = []
    for file in (folder / name for name in (WHOLE, FACTORS)):
        if not file.is_file():
            continue
        for name, info in read_header(file).items():
            part = part_of(name, targets)
            if part is None or info.dtype not in FLOAT_DTYPES:
                unused.append(name)
                continue
            change, source = changes.get(part.target, Change()), Source(file, name, info)
            changes[part.target] = _with(change, part.kind, source)
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors of {folder} belong to nothing in {base.name}: {listed(sorted(unused))}; is it an "
            "adapter of another model?"
        )
    if not changes:
        raise AdapterError(f"{folder} holds neither {FACTORS} nor {WHOLE} with any tensor: nothing to merge")
    return {name: _checked(base, name, change, settings) for name, change in changes.items()}, _notes(settings)


def _with(change: Change, kind: str, source: Source) -> Change:
    if kind == "whole":
        return replace(change, whole=source)
    part = {"a": source} if kind.endswith("A") else {"b": source}
    return replace(change, **part, embedding=kind.startswith("embedding"))  # type: ignore[arg-type]


def _checked(base: Checkpoint, name: str, change: Change, settings: Mapping[str, Any]) -> Change:
    """`change` with its scale. Raises AdapterError when shapes do not fit, a factor is missing, or ranks differ."""
    info = base.tensors.get(name) or base.tensors["model.embed_tokens.weight"]  # a head that the checkpoint has not
    if change.whole and change.whole.info.shape != info.shape:
        raise AdapterError(
            f"the adapter's {name} has shape {list(change.whole.info.shape)}, the checkpoint's {list(info.shape)}: a "
            "changed vocabulary or another size of model cannot be merged"
        )
    if change.a is None and change.b is None:
        return change
    if change.a is None or change.b is None:
        raise AdapterError(f"the adapter holds one of two factors for {name}: fetch it again")
    if name not in base.tensors:
        raise AdapterError(f"the adapter changes {name}, which the checkpoint ties to its embeddings")
    a, b = change.a.info.shape, change.b.info.shape
    fits = len(a) > 1 and len(b) > 1 and a[0] == b[1] and math.prod(a[1:]) * b[0] == math.prod(info.shape)
    rows, columns = (a[1], b[0]) if change.embedding and fits else (b[0] if b else 0, math.prod(a[1:]))
    if not fits or (rows, columns) != (info.shape[0], math.prod(info.shape[1:])):
        raise AdapterError(f"the adapter's factors {list(b)} and {list(a)} do not make {name}, {list(info.shape)}")
    return replace(change, scale=_scale(settings, module_of(name), rank=a[0]))


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by. Raises AdapterError when the config names no alpha, or another rank."""
    alpha = _of_module(settings, "alpha_pattern", module, settings.get("lora_alpha"))
    said = _of_module(settings, "rank_pattern", module, settings.get("r"))
    for key, value in (("lora_alpha", alpha), ("r", said)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise AdapterError(f"{CONFIG}: {key} should be a positive number; found {value!r:.40}")
    if said != rank:
        raise AdapterError(f"{CONFIG} says r={said} for {module}, but its factors have rank {rank}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_module(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The entry of `rank_pattern` or `alpha_pattern` whose key ends the module's name, as PEFT matches them."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{CONFIG}: {key} should be an object; found {patterns!r:.40}")
    for pattern, value in patterns.items():
        plain = pattern.lstrip("^").rstrip("$").replace("\\.", ".")
        if module == plain or module.endswith(f".{plain}"):
            return value
        if re.search(r"[\\^$*+?{}\[\]|()]", plain):
            raise AdapterError(
                f"{CONFIG}: {key} holds the pattern {pattern!r:.60}; only the ends of names are read here"
            )
    return default


def _notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    if settings.get("fan_in_fan_out"):
        return (f"{CONFIG} says fan_in_fan_out, which is for Conv1D: Qwen2's layers are Linear, so it is left aside",)
    return ()
