"""A checkpoint with a LoRA adapter merged into it, tensor by tensor as they are read.

A merged tensor is W + scale * B A, with scale alpha / r, or alpha / sqrt(r) with `use_rslora` (LoRA, arXiv 2106.09685;
rsLoRA, arXiv 2312.03732). Tensors that were trained in full replace the checkpoint's.

PEFT writes `base_model.model.<module>.lora_A.weight`. LLaVA's trainer adds a file of the tensors trained in full, under
`base_model.` or `base_model.model.`. Sources: PEFT's checkpoint format guide, LLaVA's `model/builder.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import FLOAT_DTYPES, HEAD, Checkpoint, settle_tied_embeddings
from .config import FastVLMConfig
from .errors import AdapterError, listed
from .files import combined_sha256, read_json_object
from .safetensors_files import TensorInfo, read_header
from .source_layouts import Framework
from .tensor_names import renamed

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
"""The options of PEFT under which the trained tensor is not W + scale * B A."""
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""The values of `init_lora_weights` that subtract the initial factors from the base."""


FACTOR_KINDS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "embedding_A", "lora_embedding_B": "embedding_B"}
OUTER_PREFIXES = ("base_model.", "model.", "module.")
"""The prefixes that wrappers put in front of a module's name, any number of times."""
INNER_WORDS = re.compile(r"\.(base_layer|modules_to_save(\.\w+)?|original_module)(?=\.)")
"""The words that PEFT puts inside the name of a whole tensor."""
FACTOR_NAME = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB])(\.(?!(weight|bias)$)\w+)?(\.weight)?$"
)
"""The name of a factor, perhaps with the adapter's own (`default`) inside."""


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter in relation to the checkpoint: a factor of a change, or a replacement."""

    target: str
    """The checkpoint's tensor."""
    kind: str
    """One of `A`, `B`, `embedding_A`, `embedding_B` and `whole`."""


@dataclass(frozen=True)
class Source:
    """A tensor of the adapter, in its file."""

    file: Path
    name: str
    info: TensorInfo


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

    Raises:
        AdapterError: the folder is not a LoRA adapter, belongs to another checkpoint, or has an unused tensor.
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
        """Returns the tensor `name`, merged if the adapter changes it."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, framework)
        return self._merged(name, change)

    def digest(self) -> str:
        """Returns a sha256 over the base and the adapter's files, in hex."""
        files = [file for name in (CONFIG, FACTORS, WHOLE) if (file := self._folder / name).is_file()]
        return hashlib.sha256(f"{self._base.digest()}/{combined_sha256(files)}".encode()).hexdigest()

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Returns the base's tokenizer files."""
        return self._base.tokenizer_files()

    def _merged(self, name: str, change: Change) -> Any:
        """Returns the changed tensor as a float32 numpy array, summed in float64."""
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
    """Returns `adapter_config.json` of an adapter without unsupported options. Raises AdapterError."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not a LoRA adapter: it has no {CONFIG}. Pass the folder that PEFT wrote.")
    for name in PICKLES:
        safe = name.replace(".bin", ".safetensors")
        if (folder / name).is_file() and not (folder / safe).is_file():
            raise AdapterError(
                f"{folder / name} is a pickle, which can run arbitrary code when it is opened. Convert it first, with "
                f"`safetensors.torch.save_file(torch.load({name!r}, weights_only=True), {safe!r})`"
            )
    settings = read_json_object(folder / CONFIG, AdapterError)
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG}: peft_type must be 'LORA', got {settings.get('peft_type')!r:.40}")
    unsupported = [key for key in UNKNOWN_KINDS if settings.get(key)]
    unsupported += (
        ["init_lora_weights"] if str(settings.get("init_lora_weights")).startswith(INITS_THAT_CHANGE_THE_BASE) else []
    )
    if unsupported:
        raise AdapterError(
            f"{CONFIG}: {unsupported[0]} is not supported. Merge the adapter with PEFT's merge_and_unload first."
        )
    return settings


def _changes(base: Checkpoint, folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Change], tuple[str, ...]]:
    """Returns the change of each tensor, and notes. Raises AdapterError for unused tensors."""
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
            f"{folder}: {len(unused)} tensors do not belong to {base.name}: {listed(sorted(unused))}. Does the "
            "adapter belong to another model?"
        )
    if not changes:
        raise AdapterError(f"{folder} has nothing to merge: {FACTORS} and {WHOLE} are missing or empty")
    return {name: _checked(base, name, change, settings) for name, change in changes.items()}, _notes(settings)


def _with(change: Change, kind: str, source: Source) -> Change:
    if kind == "whole":
        return replace(change, whole=source)
    part = {"a": source} if kind.endswith("A") else {"b": source}
    return replace(change, **part, embedding=kind.startswith("embedding"))  # type: ignore[arg-type]


def _checked(base: Checkpoint, name: str, change: Change, settings: Mapping[str, Any]) -> Change:
    """Returns `change` with its scale. Raises AdapterError for wrong shapes, a missing factor or a wrong rank."""
    info = base.tensors.get(name) or base.tensors["model.embed_tokens.weight"]  # a new head
    if change.whole and change.whole.info.shape != info.shape:
        raise AdapterError(
            f"the adapter's {name} must have the checkpoint's shape {list(info.shape)}, got "
            f"{list(change.whole.info.shape)}. A changed vocabulary or model size cannot be merged."
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
    return replace(change, scale=_scale(settings, name.rpartition(".")[0], rank=a[0]))


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the factor of B A. Raises AdapterError for a missing alpha or a wrong rank."""
    alpha = _of_module(settings, "alpha_pattern", module, settings.get("lora_alpha"))
    config_rank = _of_module(settings, "rank_pattern", module, settings.get("r"))
    for key, value in (("lora_alpha", alpha), ("r", config_rank)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise AdapterError(f"{CONFIG}: {key} must be a positive number, got {value!r:.40}")
    if config_rank != rank:
        raise AdapterError(f"{CONFIG} has r={config_rank} for {module}, but its factors have rank {rank}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_module(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Returns the entry of `rank_pattern` or `alpha_pattern` whose key ends the module's name, as in PEFT."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{CONFIG}: {key} must be an object, got {patterns!r:.40}")
    for pattern, value in patterns.items():
        plain = pattern.lstrip("^").rstrip("$").replace("\\.", ".")
        if module == plain or module.endswith(f".{plain}"):
            return value
        if re.search(r"[\\^$*+?{}\[\]|()]", plain):
            raise AdapterError(f"{CONFIG}: {key} must have ends of module names, got the regex {pattern!r:.60}")
    return default


def _notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    if settings.get("fan_in_fan_out"):
        return (f"{CONFIG} sets fan_in_fan_out, which is for Conv1D. Qwen2's layers are Linear, so it is ignored.",)
    return ()


def part_of(name: str, tensors: Collection[str]) -> Part | None:
    """Returns the part that `name` is for a checkpoint with `tensors`, or None if it belongs to nothing."""
    match = FACTOR_NAME.match(name)
    if match:
        target = _target(f"{match['module']}.weight", tensors)
        return Part(target, FACTOR_KINDS[match["part"]]) if target else None
    target = _target(INNER_WORDS.sub("", name), tensors)
    return Part(target, "whole") if target else None


def _target(name: str, tensors: Collection[str]) -> str | None:
    """Returns the checkpoint's tensor that `name` is, with wrappers or in Hugging Face's layout, or None."""
    while name not in tensors:
        apple = renamed(name, "hf", "apple")
        if apple in tensors:
            return apple
        prefix = next((prefix for prefix in OUTER_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name
