"""The folder of an adapter, or of a part of a checkpoint: its layout, its tensors with their targets, their scales.

| layout | factors | scale |
|---|---|---|
| PEFT, LLaVA | `<module>.lora_A.weight` (r, in), `lora_B` (out, r) | alpha / r, or alpha / sqrt(r) with `use_rslora` |
| MLX | `<module>.lora_a` (in, r), `lora_b` (r, out) | `lora_parameters.scale` |
| mlx-vlm before 2026 | `<module>.A` (in, r), `B` (r, out) | `alpha` |
| part of a checkpoint | whole tensors, such as the projector alone | |

PEFT writes `base_model.model.` in front of a module. LLaVA's trainer adds a file of the tensors trained in full, under
`base_model.` or `base_model.model.`. Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), PEFT's checkpoint
format guide, LLaVA's `model/builder.py`, mlx-lm's `tuner/lora.py`, mlx-vlm's `trainer/lora.py`.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import AdapterError, listed
from .files import read_json_object
from .foreign_files import PROJECTOR_FILES, is_system_file, matches
from .safetensors_files import TensorInfo, tensor_files
from .tensor_names import renamed

CONFIG = "adapter_config.json"
FACTORS = "adapter_model.safetensors"
WHOLE = "non_lora_trainables.safetensors"
MLX_FACTORS = "adapters.safetensors"
PROJECTOR = "mm_projector.safetensors"
PICKLED = {
    FACTORS: "adapter_model.bin",
    WHOLE: "non_lora_trainables.bin",
    PROJECTOR: "mm_projector.bin",
}
"""The pickle that older trainers write in place of each file."""
TABLE = "model.embed_tokens.weight"

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
MLX_KINDS = {"lora_a": "A", "lora_b": "B", "A": "A", "B": "B"}
OUTER_PREFIXES = ("base_model.", "model.", "module.")
"""The prefixes that wrappers put in front of a module's name, any number of times."""
INNER_WORDS = re.compile(r"\.(base_layer|modules_to_save(\.\w+)?|original_module)(?=\.)")
"""The words that PEFT puts inside the name of a whole tensor."""
FACTOR_NAME = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB])(\.(?!(weight|bias)$)\w+)?(\.weight)?$"
)
"""The name of a factor, perhaps with the adapter's own (`default`) inside."""
SAFE_PATTERN = re.compile(r"\^?(\\\.|\.\*|\w|\.|\||\((\?:)?\w+(\|\w+)*\))*\$?")
"""The keys of `rank_pattern` and `alpha_pattern` that are matched: names, `.*`, and groups of names. Other regular
expressions of an untrusted file could take forever."""
MAX_PATTERN, MAX_WILDCARDS = 200, 2
"""The longest such key, in characters, and the most `.*` in it. A match takes milliseconds at most."""
MLX_FACTOR_NAME = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b|A|B)$")


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter in relation to the checkpoint: a factor of a change, or a replacement."""

    target: str
    """The checkpoint's tensor."""
    kind: str
    """One of `A`, `B`, `embedding_A`, `embedding_B` and `whole`."""
    transposed: bool = False
    """True for MLX's factors, whose axes are the other way round."""


@dataclass(frozen=True)
class AdapterFiles:
    """The folder of an adapter, recognized and checked."""

    files: tuple[Path, ...]
    settings: Mapping[str, Any]
    """`adapter_config.json`, or empty for a part of a checkpoint."""
    notes: tuple[str, ...] = ()
    converted: Any = field(default=None, repr=False)
    """The temporary folder of files that were pickles. It is removed with this object."""

    def scale(self, module: str, rank: int) -> float:
        """Returns the factor of B A. Raises AdapterError for a missing value or a wrong rank."""
        if "lora_parameters" in self.settings or "peft_type" not in self.settings:
            return _mlx_scale(self.settings, module, rank)
        return _peft_scale(self.settings, module, rank)


def open_adapter(folder: Path, allow_pickle: bool) -> AdapterFiles:
    """Returns the files of an adapter, or of a part of a checkpoint.

    Raises:
        AdapterError: the folder is neither, has unsupported options, or has a pickle without `allow_pickle`.
        WeightsError: a pickle cannot be read.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder. Pass the folder that the trainer wrote.")
    if not (folder / CONFIG).is_file():
        return _part_of_checkpoint(folder, allow_pickle)
    settings = read_json_object(folder / CONFIG, AdapterError)
    if "peft_type" not in settings and ("fine_tune_type" in settings or "rank" in settings):
        _check_mlx(settings)
        return AdapterFiles((_mlx_file(folder),), settings)
    _check_peft(settings)
    return _with_pickles(folder, (WHOLE, FACTORS), settings, _peft_notes(settings), allow_pickle)


def _part_of_checkpoint(folder: Path, allow_pickle: bool) -> AdapterFiles:
    """Returns the files of a folder that has whole tensors only, such as LLaVA's first stage."""
    names = [path.name for path in folder.iterdir() if not is_system_file(path)]
    if any(matches(name, PROJECTOR_FILES) for name in names):
        return _with_pickles(folder, (PROJECTOR,), {}, (), allow_pickle)
    if any(name.endswith(".safetensors") for name in names):
        return AdapterFiles(tuple(sorted(set(tensor_files(folder).files.values()))), {})
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    wanted = f"an adapter inside it (got {listed(inside)})" if inside else "the folder that the trainer wrote"
    raise AdapterError(f"{folder} is not a LoRA adapter: it has no {CONFIG}. Pass {wanted}.")


def _with_pickles(
    folder: Path, names: Collection[str], settings: Mapping[str, Any], notes: tuple[str, ...], allow_pickle: bool
) -> AdapterFiles:
    """Returns the files `names` that exist, made from their pickles if `allow_pickle` asks for it."""
    files, converted = [], None
    for name in names:
        pickle = folder / PICKLED[name]
        if (folder / name).is_file():
            files.append(folder / name)
        elif pickle.is_file() and not allow_pickle:
            raise AdapterError(
                f"{pickle} is a pickle, which can run arbitrary code when it is opened. Pass allow_pickle=True to read "
                "it in a process of its own, as tensors only, or convert it with "
                f"`safetensors.torch.save_file(torch.load({pickle.name!r}, weights_only=True), {name!r})`.",
                "allow_pickle",
            )
        elif pickle.is_file():
            from .pickles import as_safetensors

            converted = converted or tempfile.TemporaryDirectory(prefix="fastvlm-")
            as_safetensors(pickle, Path(converted.name) / name)
            files.append(Path(converted.name) / name)
    return AdapterFiles(tuple(files), settings, notes, converted)


def _mlx_file(folder: Path) -> Path:
    """Returns the factors of an MLX adapter: its own file, or the only saved step."""
    if (folder / MLX_FACTORS).is_file():
        return folder / MLX_FACTORS
    steps = sorted(path for path in folder.glob(f"*_{MLX_FACTORS}") if not is_system_file(path))
    if len(steps) != 1:
        found = f"{len(steps)} saved steps: {listed(path.name for path in steps)}" if steps else "no such file"
        raise AdapterError(f"{folder}: an MLX adapter must have {MLX_FACTORS} (got {found}). Copy one to that name.")
    return steps[0]


def _check_peft(settings: Mapping[str, Any]) -> None:
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


def _check_mlx(settings: Mapping[str, Any]) -> None:
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise AdapterError(
            f"{CONFIG}: fine_tune_type must be 'lora' or 'full', got {kind!r:.40}. Fuse the adapter with mlx-lm or "
            "mlx-vlm first."
        )


def _mlx_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns mlx-lm's `scale`, or mlx-vlm's older `alpha`, which is the whole factor there."""
    parameters = settings.get("lora_parameters", settings)
    if not isinstance(parameters, Mapping):
        raise AdapterError(f"{CONFIG}: lora_parameters must be an object, got {parameters!r:.40}")
    key = "scale" if "lora_parameters" in settings else "alpha"
    scale = parameters.get(key)
    _check_positive(key, scale)
    _check_positive("rank", parameters.get("rank"))
    _check_rank("rank", parameters["rank"], module, rank)
    return float(scale)  # type: ignore[arg-type]


def _peft_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _of_module(settings, "alpha_pattern", module, settings.get("lora_alpha"))
    config_rank = _of_module(settings, "rank_pattern", module, settings.get("r"))
    _check_positive("lora_alpha", alpha)
    _check_positive("r", config_rank)
    _check_rank("r", config_rank, module, rank)
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _check_positive(key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise AdapterError(f"{CONFIG}: {key} must be a positive number, got {value!r:.40}")


def _check_rank(key: str, written: float, module: str, rank: int) -> None:
    if written != rank:
        raise AdapterError(f"{CONFIG} has {key}={written} for {module}, but its factors have rank {rank}")


def _of_module(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Returns the value in `rank_pattern` or `alpha_pattern` whose key ends the name of a module, as in PEFT."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{CONFIG}: {key} must be an object, got {patterns!r:.40}")
    for pattern, value in patterns.items():
        simple = len(pattern) <= MAX_PATTERN and pattern.count(".*") <= MAX_WILDCARDS
        if not simple or not SAFE_PATTERN.fullmatch(pattern):
            raise AdapterError(
                f"{CONFIG}: {key} must have names or simple patterns such as '.*\\.q_proj' (got {pattern!r:.60}). "
                "Merge the adapter with PEFT's merge_and_unload first."
            )
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _peft_notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    if settings.get("fan_in_fan_out"):
        return (f"{CONFIG} sets fan_in_fan_out, which is for Conv1D. Qwen2's layers are Linear, so it is ignored.",)
    return ()


def part_of(name: str, info: TensorInfo, tensors: Collection[str]) -> Part | None:
    """Returns the part that `name` is for a checkpoint with `tensors`, or None if it belongs to nothing."""
    if match := FACTOR_NAME.match(name):
        target = _target(f"{match['module']}.weight", tensors)
        return Part(target, FACTOR_KINDS[match["part"]]) if target else None
    if (match := MLX_FACTOR_NAME.match(name)) and len(info.shape) == 2:
        target = _target(f"{match['module']}.weight", tensors)
        kind = MLX_KINDS[match["part"]]
        return Part(target, f"embedding_{kind}" if target == TABLE else kind, transposed=True) if target else None
    target = _target(INNER_WORDS.sub("", name), tensors)
    return Part(target, "whole") if target else None


def _target(name: str, tensors: Collection[str]) -> str | None:
    """Returns the checkpoint's tensor that `name` is, with wrappers or in another layout, or None."""
    while name not in tensors:
        for written in (name, f"model.{name}"):
            for apple in (written, renamed(written, "hf", "apple"), renamed(written, "mlx", "apple")):
                if apple in tensors:
                    return apple
        prefix = next((prefix for prefix in OUTER_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name
