"""A source checkpoint: its config and its tensors, each read from the file on first use.

Safetensors only, single-file or sharded, memory-mapped. The content (`model_type` in config.json and the tensors'
names) decides on the layout, never the folder's name. Names, shapes and config fields are always those of Apple's LLaVA
layout here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import FastVLMConfig, config_notes
from .errors import CheckpointError, WeightsError, listed
from .files import combined_sha256, read_json_object
from .quantization import check_not_foreign
from .safetensors_files import Shape, TensorInfo, WeightFiles, not_a_checkpoint, read_header, tensor_files
from .source_layouts import Framework, open_source
from .tensor_names import UNMERGED_FACTOR, UNUSED_TENSORS, unwrapped
from .tokenizer_files import image_token_id, with_plain_template

if TYPE_CHECKING:
    from ._mlx import mx

FLOAT_DTYPES = ("BF16", "F16", "F32")
WIDE = "F64"
"""The dtype that is read as float32: some trainers save it, and MLX does not read it."""
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"


class Checkpoint(Protocol):
    """A source of weights in Apple's LLaVA layout."""

    @property
    def name(self) -> str:
        """The name for reports and manifests."""

    @property
    def config(self) -> FastVLMConfig:
        """The validated config."""

    @property
    def config_dict(self) -> Mapping[str, Any]:
        """The content of `config.json` in Apple's fields."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The shape and dtype of every tensor, by Apple's name."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks for the user: contradictions between files, random weights."""

    def read(self, name: str, framework: Framework) -> Any:
        """Returns the tensor `name` as an array for `torch.as_tensor` (pt) or `mx.array` (mlx)."""

    def digest(self) -> str:
        """Returns a sha256 that identifies the weights, in hex."""

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Returns the tokenizer's files by name, at least `tokenizer.json`."""


class FolderCheckpoint:
    """A checkpoint folder in any layout of `source_layouts`.

    Raises:
        CheckpointError: the folder is not a checkpoint, or has an unsupported layout.
        ConfigError: `config.json` is missing, malformed or contradicts itself.
        WeightsError: a weight file is damaged, or a pickle.
    """

    def __init__(self, folder: Path, name: str | None = None, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self._open_files: dict[Path, Any] = {}
        self._wide_files: dict[Path, bool] = {}
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder. A checkpoint is a folder with config.json and *.safetensors."
            )
        if not (folder / "config.json").is_file():
            raise not_a_checkpoint(folder, "config.json")
        raw_config = read_json_object(folder / "config.json")
        self._weights = self._weight_files(allow_pickle)
        headers = self._headers()
        quantizer = check_not_foreign(raw_config, headers)
        self._names = {plain: name for name, plain in unwrapped(headers).items()}
        self._source = open_source(folder, raw_config, self._used(headers))
        self.layout = self._source.layout
        self.config_dict = self._source.config
        self.tensors = {name: view.info for name, view in self._source.views.items()}
        generation = folder / "generation_config.json"
        config = FastVLMConfig.from_dict(
            self.config_dict, read_json_object(generation) if generation.is_file() else None
        )
        self.config, tied = settle_tied_embeddings(config, self.config_dict, self.tensors, self.read)
        self.notes = (
            *self._weights.notes,
            *self._wrapper_notes(),
            *quantizer,
            *self._source.notes,
            *config_notes(self.config_dict),
            *tied,
            *vocabulary_notes(self.config, self.tensors),
            *self._image_notes(),
        )

    def read(self, name: str, framework: Framework) -> Any:
        """Returns the tensor `name` in Apple's layout."""
        return self._source.views[name].read(self._read_raw, framework)

    def digest(self) -> str:
        """Returns a sha256 over config.json and every weight file, in the order of their names."""
        return combined_sha256([self.folder / "config.json", *sorted(set(self._weights.files.values()))])

    def tokenizer_files(self) -> dict[str, bytes]:
        """Returns the tokenizer's files, with a chat template that accepts strings."""
        return read_tokenizer_files(self.folder)

    def _weight_files(self, allow_pickle: bool) -> WeightFiles:
        """Returns the weight files, which are made from pickles in a temporary folder if `allow_pickle` asks for it."""
        if not allow_pickle or any(self.folder.glob("*.safetensors")):
            return tensor_files(self.folder)
        from .pickles import weights_as_safetensors

        self._converted = tempfile.TemporaryDirectory(prefix="fastvlm-")  # removed with this checkpoint
        weights_as_safetensors(self.folder, Path(self._converted.name))
        return tensor_files(Path(self._converted.name))

    def _headers(self) -> dict[str, TensorInfo]:
        """Returns every tensor by its name in the files."""
        found: dict[str, TensorInfo] = {}
        files = self._weights.files
        for file in dict.fromkeys(files.values()):
            found.update((name, info) for name, info in read_header(file).items() if files[name] == file)
        return found

    def _used(self, headers: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Returns the tensors that are read, by their names without wrappers. Raises WeightsError for LoRA factors."""
        factors = sorted(name for name in headers if UNMERGED_FACTOR.search(name))
        if factors:
            raise WeightsError(
                f"{self.folder}: the weights contain a LoRA that is not merged (got {listed(factors, 2)}). Merge it "
                "with PEFT's merge_and_unload first."
            )
        check_not_empty(str(self.folder), headers)
        used = {plain: headers[name] for plain, name in self._names.items() if not UNUSED_TENSORS.search(plain)}
        return {
            name: TensorInfo(info.shape, "F32") if info.dtype == WIDE else info for name, info in used.items()
        }  # read as float32

    def _wrapper_notes(self) -> tuple[str, ...]:
        changed = [(name, plain) for plain, name in self._names.items() if name != plain]
        if not changed:
            return ()
        return (f"the names of {len(changed)} tensors are those of a training wrapper or an older version: "
                f"{changed[0][0]} is read as {changed[0][1]}",)  # fmt: skip

    def _read_raw(self, plain_name: str, framework: Framework) -> Any:
        name = self._names[plain_name]
        file = self._weights.files[name]
        if framework == "mlx" and not self._has_wide(file):
            # Opened each time: the evaluated arrays of an open file stay in memory as long as it is referenced.
            return load_lazily(file)[name]
        tensor = self._torch_file(file).get_tensor(name)
        if framework == "pt":
            return tensor.float() if tensor.element_size() == 8 and tensor.is_floating_point() else tensor
        from ._mlx import mx

        return mx.array(tensor.float().numpy())

    def _has_wide(self, file: Path) -> bool:
        """Returns True if a file has float64, with which MLX reads none of its tensors."""
        if file not in self._wide_files:
            self._wide_files[file] = any(info.dtype == WIDE for info in read_header(file).values())
        return self._wide_files[file]

    def _torch_file(self, file: Path) -> Any:
        """Returns an open weight file, memory-mapped."""
        from safetensors import safe_open

        if file not in self._open_files:
            self._open_files[file] = safe_open(file, framework="pt")
        return self._open_files[file]

    def _image_notes(self) -> tuple[str, ...]:
        """Returns a note if config.json and the tokenizer disagree about the id of `<image>`."""
        index, file = self.config.image_token_index, self.folder / "tokenizer.json"
        if index is None or index < 0 or not file.is_file():
            return ()
        found = image_token_id(read_json_object(file))
        if found is None or found == index:
            return ()
        return (
            f"config.json has image_token_index={index}, but tokenizer.json has <image> at {found}: "
            "the tokenizer decides",
        )


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the tokenizer's files in a folder, with a chat template that accepts strings. Raises ConfigError."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
             "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # fmt: skip
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    legacy = folder / "chat_template.json"  # of a processor, before chat_template.jinja
    if legacy.is_file() and not any(b"chat_template" in content for content in files.values()):
        template = read_json_object(legacy).get("chat_template")
        if isinstance(template, str):
            files.setdefault("chat_template.jinja", template.encode())
    return with_plain_template(files)


def settle_tied_embeddings(
    config: FastVLMConfig,
    config_dict: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str, Framework], Any],
) -> tuple[FastVLMConfig, tuple[str, ...]]:
    """Corrects `tie_word_embeddings`, which is sometimes wrong, by the tensors, and returns a note about it.

    Embeddings are untied if there is an `lm_head` that differs from `embed_tokens`.

    Raises:
        WeightsError: `lm_head` is missing, though the config asks for one.
    """
    if HEAD not in tensors and config_dict.get("tie_word_embeddings") is False:
        raise WeightsError(
            f"1 missing: {HEAD}, but config.json has tie_word_embeddings=false. Download the checkpoint again."
        )
    tied = HEAD not in tensors or _head_repeats_embeddings(tensors, read)
    if tied == config.decoder.tie_word_embeddings:
        return config, ()
    state = "ties them" if tied else "does not"
    note = f"config.json has tie_word_embeddings={not tied}, but the checkpoint {state}: the weights decide"
    return config.with_tied_embeddings(tied), (note,)


def _head_repeats_embeddings(tensors: Mapping[str, TensorInfo], read: Callable[[str, Framework], Any]) -> bool:
    if TABLE not in tensors or tensors[HEAD] != tensors[TABLE]:
        return False
    head, table = (read(name, "pt") for name in (HEAD, TABLE))
    return bool((head[:64] == table[:64]).all()) and bool((head == table).all())


def vocabulary_notes(config: FastVLMConfig, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Returns a note if `vocab_size` in config.json differs from the rows of the embedding table."""
    if TABLE not in tensors or len(tensors[TABLE].shape) != 2:
        return ()  # reported by the comparison of all tensors
    rows, vocab_size = tensors[TABLE].shape[0], config.decoder.vocab_size
    if rows == vocab_size:
        return ()
    return (f"config.json has vocab_size={vocab_size}, but embed_tokens has {rows} rows: the weights decide",)


def load_lazily(file: Path) -> dict[str, mx.array]:
    """Returns MLX arrays by name, each read from the file when it is first evaluated. Raises WeightsError.

    (The MLX reader of safetensors goes through numpy, which has no bfloat16.)
    """
    from ._mlx import mx

    try:
        tensors = mx.load(str(file))
    except RuntimeError as reason:  # an unsupported dtype, or a damaged file
        raise WeightsError(f"{file} cannot be read: {str(reason).splitlines()[0]}") from None
    assert isinstance(tensors, dict)
    return tensors


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], part: str) -> None:
    """Raises WeightsError with the names and shapes in which `found` differs from `expected`."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} must be {list(expected[name])}, got {list(found[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    faults = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if names
    ]
    if faults:
        raise WeightsError(f"the {part}'s tensors do not match its architecture: {'; '.join(faults)}")


def check_not_empty(subject: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises WeightsError for tensors without elements, which DeepSpeed's ZeRO-3 leaves unless it gathers them."""
    empty = sorted(name for name, info in tensors.items() if 0 in info.shape)
    if empty:
        raise WeightsError(
            f"{subject}: {len(empty)} tensors are empty, as DeepSpeed's ZeRO-3 saves them (got {listed(empty, 2)}). "
            "Run zero_to_fp32.py on the folder of the training, or save with "
            "stage3_gather_16bit_weights_on_model_save."
        )


def tensors_under(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """Returns the tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}


def shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Returns the shape of each tensor."""
    return {name: info.shape for name, info in tensors.items()}


def iter_float_tensors(checkpoint: Checkpoint, names: Iterable[str], framework: Framework) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor) one by one. Raises WeightsError at the first that is not floating-point."""
    for name in names:
        if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise WeightsError(f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {checkpoint.tensors[name].dtype}")
        yield name, checkpoint.read(name, framework)
