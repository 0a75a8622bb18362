"""A source checkpoint: its config and its tensors, each read from the file only when it is asked for.

Safetensors only, single-file or sharded, memory-mapped. The layout is told from the content (config.json's
`model_type` and the tensors' names), never from the folder's name; whatever it is, names, shapes and config fields are
those of Apple's LLaVA layout here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .apple_layout import APPLE_ENCODER_PREFIX as APPLE_ENCODER_PREFIX
from .config import FastVLMConfig
from .errors import CheckpointError, WeightsError
from .json_file import read_json_object
from .safetensors_header import TensorInfo as TensorInfo
from .safetensors_header import read_header as read_header
from .source_layouts import open_source
from .tensor_views import Framework as Framework
from .tokenizer_json import image_token_id, with_plain_template
from .weight_files import listed, tensor_files, what_is_there

if TYPE_CHECKING:
    from ._mlx import mx

Shape = tuple[int, ...]

FLOAT_DTYPES = ("BF16", "F16", "F32")
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"


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
    """A checkpoint folder in Apple's LLaVA layout, or in one that is read as if it were (`source_layouts`).

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
            raise CheckpointError(f"{folder} holds no config.json, so it is no checkpoint; {what_is_there(folder)}")
        raw_config = read_json_object(folder / "config.json")
        self._files = tensor_files(folder)
        self._source = open_source(folder, raw_config, self._headers())
        self.layout = self._source.layout
        self.config_dict = self._source.config
        self.tensors = {name: view.info for name, view in self._source.views.items()}
        generation = folder / "generation_config.json"
        config = FastVLMConfig.from_dict(
            self.config_dict, read_json_object(generation) if generation.is_file() else None
        )
        self.config, tied = settle_tied_embeddings(config, self.config_dict, self.tensors, self.read)
        self.notes = (*self._source.notes, *tied, *vocabulary_notes(self.config, self.tensors), *self._image_notes())

    def read(self, name: str, framework: Framework) -> Any:
        return self._source.views[name].read(self._read_raw, framework)

    def digest(self) -> str:
        """sha256 over config.json and every weight file, in the order of their names."""
        return file_digest([self.folder / "config.json", *sorted(set(self._files.values()))])

    def tokenizer_files(self) -> dict[str, bytes]:
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # fmt: skip
        files = {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).is_file()}
        return with_plain_template(files)

    def _headers(self) -> dict[str, TensorInfo]:
        """Every tensor by its name in the files."""
        found: dict[str, TensorInfo] = {}
        for file in dict.fromkeys(self._files.values()):
            found.update((name, info) for name, info in read_header(file).items() if self._files[name] == file)
        return found

    def _read_raw(self, name: str, framework: Framework) -> Any:
        file = self._files[name]
        if framework == "mlx":
            # Opened anew each time: an open file's arrays stay in memory, once evaluated, as long as it is kept.
            return load_lazily(file)[name]
        return self._torch_file(file).get_tensor(name)

    def _torch_file(self, file: Path) -> Any:
        """An open weight file, memory-mapped."""
        from safetensors import safe_open

        if file not in self._open_files:
            self._open_files[file] = safe_open(file, framework="pt")
        return self._open_files[file]

    def _image_notes(self) -> tuple[str, ...]:
        """Where config.json and the tokenizer disagree about the id of `<image>`."""
        said, file = self.config.image_token_index, self.folder / "tokenizer.json"
        if said is None or said < 0 or not file.is_file():
            return ()
        found = image_token_id(read_json_object(file))
        if found is None or found == said:
            return ()
        return (f"config.json says image_token_index={said}, but tokenizer.json has <image> at {found}: it decides",)


def settle_tied_embeddings(
    config: FastVLMConfig,
    config_dict: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str, Framework], Any],
) -> tuple[FastVLMConfig, tuple[str, ...]]:
    """`tie_word_embeddings` is sometimes wrong: an `lm_head` that differs from `embed_tokens` means untied.

    Raises:
        WeightsError: there is no head, though the config asks for one.
    """
    if HEAD not in tensors and config_dict.get("tie_word_embeddings") is False:
        raise WeightsError(f"1 missing: {HEAD}, since config.json says tie_word_embeddings=false; fetch it again")
    tied = HEAD not in tensors or _head_repeats_embeddings(tensors, read)
    if tied == config.decoder.tie_word_embeddings:
        return config, ()
    state = "ties them" if tied else "does not"
    note = f"config.json says tie_word_embeddings={not tied}, but the checkpoint {state}: the weights decide"
    return config.with_tied_embeddings(tied), (note,)


def _head_repeats_embeddings(tensors: Mapping[str, TensorInfo], read: Callable[[str, Framework], Any]) -> bool:
    if TABLE not in tensors or tensors[HEAD] != tensors[TABLE]:
        return False
    head, table = (read(name, "pt") for name in (HEAD, TABLE))
    return bool((head[:64] == table[:64]).all()) and bool((head == table).all())


def vocabulary_notes(config: FastVLMConfig, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Where config.json names another vocabulary than the embedding table has rows."""
    if TABLE not in tensors or len(tensors[TABLE].shape) != 2:
        return ()  # the comparison of all tensors will tell
    rows, said = tensors[TABLE].shape[0], config.decoder.vocab_size
    if rows == said:
        return ()
    return (f"config.json says vocab_size={said}, but embed_tokens has {rows} rows: the weights decide",)


def file_digest(files: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file, in hex."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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
        f"{len(names)} {kind}: {listed(names)}"
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


def iter_float_tensors(checkpoint: Checkpoint, names: Iterable[str], framework: Framework) -> Iterator[tuple[str, Any]]:
    """(name, tensor) one by one. Raises WeightsError at the first that does not hold floating-point numbers."""
    for name in names:
        if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise WeightsError(
                f"{name} holds {checkpoint.tensors[name].dtype}; weights should be one of {', '.join(FLOAT_DTYPES)}"
            )
        yield name, checkpoint.read(name, framework)
