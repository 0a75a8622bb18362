"""A source checkpoint: its config and its tensors, each read from the file only when it is asked for.

Safetensors only, single-file or sharded, memory-mapped. The layout is told from the content (config.json's
`model_type` and the tensors' names), never from the folder's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .apple_layout import APPLE_ENCODER_PREFIX as APPLE_ENCODER_PREFIX
from .config import FastVLMConfig
from .errors import CheckpointError, ConfigError, WeightsError
from .json_file import read_json_object
from .safetensors_header import TensorInfo as TensorInfo
from .safetensors_header import read_header as read_header

if TYPE_CHECKING:
    from ._mlx import mx

Framework = Literal["pt", "mlx"]
Shape = tuple[int, ...]

FLOAT_DTYPES = ("BF16", "F16", "F32")
MAX_LISTED_NAMES = 6
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint(Protocol):
    """A source of weights in Apple's LLaVA layout."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> FastVLMConfig: ...

    @property
    def config_dict(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: where files contradicted themselves, that weights are random."""

    def read(self, name: str, framework: Framework) -> Any:
        """The tensor `name`, as something that `torch.as_tensor` (pt) or `mx.array` (mlx) takes."""

    def digest(self) -> str:
        """sha256 of what the weights are made from, in hex."""

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """The tokenizer's files by name; at least `tokenizer.json`."""


class FolderCheckpoint:
    """A checkpoint folder in Apple's LLaVA layout.

    Raises:
        CheckpointError: the folder is no such checkpoint, or of a layout that is not read here.
        ConfigError: `config.json` is missing, malformed or contradicts itself.
        WeightsError: a weight file is damaged, or a pickle.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self._open_files: dict[Path, Any] = {}
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a checkpoint is one with config.json and *.safetensors")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no config.json, so it is no checkpoint; {_what_is_there(folder)}")
        self.config_dict = read_json_object(folder / "config.json")
        self._files = _tensor_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file in dict.fromkeys(self._files.values()):
            self.tensors.update((name, info) for name, info in read_header(file).items() if self._files[name] == file)
        _check_layout(folder, self.config_dict, self.tensors)
        generation = folder / "generation_config.json"
        config = FastVLMConfig.from_dict(
            self.config_dict, read_json_object(generation) if generation.is_file() else None
        )
        self.config, self.notes = self._settle_tied_embeddings(config)

    def read(self, name: str, framework: Framework) -> Any:
        file = self._files[name]
        if framework == "mlx":
            # Opened anew each time: an open file's arrays stay in memory, once evaluated, as long as it is kept.
            return load_lazily(file)[name]
        return self._torch_file(file).get_tensor(name)

    def digest(self) -> str:
        """sha256 over config.json and every weight file, in the order of their names."""
        digest = hashlib.sha256()
        for file in [self.folder / "config.json", *sorted(set(self._files.values()))]:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def tokenizer_files(self) -> dict[str, bytes]:
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # fmt: skip
        return {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).is_file()}

    def _torch_file(self, file: Path) -> Any:
        """An open weight file, memory-mapped."""
        from safetensors import safe_open

        if file not in self._open_files:
            self._open_files[file] = safe_open(file, framework="pt")
        return self._open_files[file]

    def _settle_tied_embeddings(self, config: FastVLMConfig) -> tuple[FastVLMConfig, tuple[str, ...]]:
        """`tie_word_embeddings` is sometimes wrong: an `lm_head` that differs from `embed_tokens` means untied."""
        if "lm_head.weight" not in self.tensors and self.config_dict.get("tie_word_embeddings") is False:
            raise WeightsError(
                "1 missing: lm_head.weight, since config.json says tie_word_embeddings=false; fetch it again"
            )
        tied = "lm_head.weight" not in self.tensors or self._lm_head_repeats_embeddings()
        if tied == config.decoder.tie_word_embeddings:
            return config, ()
        state = "ties them" if tied else "does not"
        note = f"config.json says tie_word_embeddings={not tied}, but the checkpoint {state}: the weights decide"
        return config.with_tied_embeddings(tied), (note,)

    def _lm_head_repeats_embeddings(self) -> bool:
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if names[1] not in self.tensors or self.tensors[names[0]] != self.tensors[names[1]]:
            return False
        head, table = (self.read(name, "pt") for name in names)
        return bool((head[:64] == table[:64]).all()) and bool((head == table).all())


def load_lazily(file: Path) -> dict[str, mx.array]:
    """MLX arrays by name, each read from the file when it is first evaluated. Raises WeightsError.

    (safetensors' own MLX reader goes through numpy, which has no bfloat16.)
    """
    from ._mlx import mx

    try:
        tensors = mx.load(str(file))
    except RuntimeError as reason:  # an unsupported dtype, or a damaged file
        raise WeightsError(f"{file} cannot be read: {str(reason).splitlines()[0]}") from None
    assert isinstance(tensors, dict)
    return tensors


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str) -> None:
    """Raises WeightsError that lists the names and shapes in which `found` differs from `expected`."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} should be {list(expected[name])}, is {list(found[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    faults = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if names
    ]
    if faults:
        raise WeightsError(f"the {what}'s tensors do not match its architecture: {'; '.join(faults)}")


def tensors_under(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}


def shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    return {name: info.shape for name, info in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return ", ".join(names[:MAX_LISTED_NAMES]) + more


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor. Raises CheckpointError or WeightsError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(folder, read_json_object(index, WeightsError).get("weight_map"))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors, so it is no checkpoint; {_what_is_there(folder)}")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} *.safetensors files without model.safetensors.index.json: "
            "fetch the index, or leave the one file that counts"
        )
    return dict.fromkeys(read_header(files[0]), files[0])


def _indexed_files(folder: Path, weight_map: Any) -> dict[str, Path]:
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(
            f"{folder}/model.safetensors.index.json should map tensor names to file names ('weight_map')"
        )
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise WeightsError(f"{folder}/model.safetensors.index.json names a file outside the folder: {name!r:.80}")
    headers = {name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    absent = sorted(tensor for tensor, file in weight_map.items() if tensor not in headers[file])
    unlisted = sorted({tensor for header in headers.values() for tensor in header} - weight_map.keys())
    if absent or unlisted:
        raise WeightsError(
            f"model.safetensors.index.json and the shards disagree on {len(absent) + len(unlisted)} tensors: "
            f"{_listed(absent + unlisted)}; fetch the checkpoint again"
        )
    return {tensor: folder / file for tensor, file in weight_map.items()}


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"found the pickle {pickles[0]}, which can run foreign code when it is opened: convert it first, with "
            "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')`"
        )
    return f"found {_listed(names)}" if names else "the folder is empty"


def _check_layout(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError unless this is Apple's LLaVA layout, naming the layout that was found instead."""
    if any(name.startswith(APPLE_ENCODER_PREFIX) for name in tensors):
        if config.get("model_type") != "llava_qwen2":
            raise ConfigError(
                f"config.json: model_type should be 'llava_qwen2'; found {config.get('model_type')!r:.80}"
            )
        return
    for layout, prefix in OTHER_LAYOUTS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(
                f"{folder} is a checkpoint in the {layout} layout, which is not read yet: "
                "pass the Apple LLaVA checkpoint that it was made from"
            )
    raise CheckpointError(
        f"{folder} is no FastVLM checkpoint in Apple's LLaVA layout: no tensor starts with {APPLE_ENCODER_PREFIX!r}; "
        f"found model_type {config.get('model_type')!r:.40} and tensors such as {_listed(sorted(tensors)[:3])}"
    )


OTHER_LAYOUTS = {
    "Hugging Face native (fast_vlm)": "model.vision_tower.timm_model.",
    "mlx-vlm": "vision_tower.vision_model.",
    "exported model folder": "language_model.model.",
}


def iter_float_tensors(checkpoint: Checkpoint, names: Iterable[str], framework: Framework) -> Iterator[tuple[str, Any]]:
    """(name, tensor) one by one. Raises WeightsError at the first that does not hold floating-point numbers."""
    for name in names:
        if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise WeightsError(
                f"{name} holds {checkpoint.tensors[name].dtype}; weights should be one of {', '.join(FLOAT_DTYPES)}"
            )
        yield name, checkpoint.read(name, framework)
