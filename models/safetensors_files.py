"""Safetensors files: headers checked before any data is mapped, the shards of a folder, and a writer with bfloat16.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the length N of the header, little-endian, then N bytes
of JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `__metadata__`. The data follows,
without gaps, and the offsets are relative to it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, FastVLMError, WeightsError, listed
from .files import parse_json_object, read_json_object, write_json
from .foreign_files import (
    ADAPTER_FILES,
    PROJECTOR_FILES,
    checkpoints_inside,
    foreign_file,
    foreign_folder,
    is_system_file,
    matches,
    pickles_in,
)

if TYPE_CHECKING:
    from ._mlx import mx

Shape = tuple[int, ...]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

MAX_HEADER_BYTES = 8 * 2**20
"""The longest header that is read, in bytes. A 7B checkpoint's takes 100 kB."""

MAX_RANK = 8
"""The highest number of dimensions of a tensor. Convolutions have four."""

MAX_SHARD_BYTES = 2 * 2**30
"""The size from which a new shard begins, in bytes. A shard is in memory until it is written."""

HEADER_ALIGNMENT = 8
"""The multiple of bytes to which a header is padded, so that 8-byte numbers are aligned."""

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
"""The name of a shard, from which its siblings follow."""

HEAD_NAME = "lm_head.weight"
"""The end of the one tensor that an index may list without a shard: transformers lists the head of tied embeddings."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""The width of one element in bits, by safetensors' name of the dtype."""

MLX_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint32": "U32"}
"""Safetensors' name of each MLX dtype that an export holds."""


@dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of one tensor in a safetensors header."""

    shape: Shape
    dtype: str
    """Safetensors' name, such as `BF16`, `F16`, `F32` or `I64`."""


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns names, shapes and dtypes of the tensors in a safetensors file, in the order of their data.

    Raises:
        WeightsError: the file is missing, not a regular file, truncated or longer than its header says, or the header
            is malformed or contradicts itself.
    """
    try:
        if file.exists() and not file.is_file():
            raise WeightsError(f"{file} is not a regular file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = _header(stream.read(8), size, stream)
        values = parse_json_object(content, "its header", _HeaderError)
        return _checked_entries(values, size - 8 - len(content))
    except FileNotFoundError:
        raise WeightsError(f"{file} does not exist") from None
    except (OSError, ValueError) as reason:  # ValueError: a name with a NUL in it
        raise WeightsError(f"{file!s:.400} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    except _HeaderError as reason:
        if foreign := foreign_file(file):
            raise WeightsError(f"{file} is {foreign}", "allow_pickle") from None
        raise WeightsError(
            f"{file} is truncated or corrupt, not a whole safetensors file ({reason}). Download it again."
        ) from None


class _HeaderError(WeightsError):
    """A fault in a header, raised before the name of its file is known."""


def _header(length: bytes, size: int, stream: Any) -> bytes:
    if len(length) < 8:
        raise _HeaderError(f"it has {size} bytes")
    (count,) = struct.unpack("<Q", length)
    if count > size - 8:
        raise _HeaderError(f"its header must have {count} bytes, got {size - 8}")
    if count > MAX_HEADER_BYTES:
        raise _HeaderError(f"its header must have at most {MAX_HEADER_BYTES} bytes, got {count}")
    content = stream.read(count)
    if len(content) != count or content[:1] != b"{":
        raise _HeaderError("its header is not a JSON object")
    return content


def _checked_entries(values: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise _HeaderError("its __metadata__ must map names to strings")
    entries = {name: _entry(name, value) for name, value in values.items()}
    order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    end = 0
    for name in order:
        if entries[name].begin != end:
            raise _HeaderError(f"{name!r:.80} must begin at byte {end} of the data, got {entries[name].begin}")
        end = entries[name].end
    if end != data_bytes:
        raise _HeaderError(f"its tensors take {end} bytes, but the data has {data_bytes}")
    return {name: entries[name].info for name in order}


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{name!r:.80} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _HeaderError(f"{name!r:.80} has the unsupported dtype {dtype!r:.40}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _HeaderError(f"{name!r:.80} has the invalid shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderError(f"{name!r:.80} has the invalid data_offsets {offsets!r:.80}")
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _HeaderError(
            f"{name!r:.80} of {dtype} {shape!r:.80} must take {bits / 8:g} bytes, got {offsets[1] - offsets[0]}"
        )
    return _Entry(TensorInfo(tuple(shape), dtype), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48 for size in values
    )


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint folder."""

    files: dict[str, Path]
    """The file of each tensor, by its name in the file."""
    notes: tuple[str, ...] = ()


def tensor_files(folder: Path) -> WeightFiles:
    """Returns the file of each tensor in a checkpoint folder, and notes about the other weight files.

    Shards without an index are read by their names and headers. The files of an adapter or of another training stage
    are not part of the checkpoint. macOS's own files are ignored.

    Raises:
        CheckpointError: weights are missing, or there are several files that could be the weights.
        WeightsError: a file is missing, damaged, or disagrees with the index.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if not is_system_file(path))
    extra = [path.name for path in found if matches(path.name, (*ADAPTER_FILES, *PROJECTOR_FILES))]
    files = [path for path in found if path.name not in extra]
    notes = tuple(f"{name} is not merged into the checkpoint (adapter=FOLDER merges it)" for name in extra)
    if (folder / INDEX_NAME).is_file():
        return WeightFiles(_indexed_files(folder), notes)
    if not files:
        raise not_a_checkpoint(folder, "*.safetensors")
    if folder / WEIGHTS_NAME in files:
        others = [path.name for path in files if path.name != WEIGHTS_NAME and not SHARD_NAME.fullmatch(path.name)]
        if len(others) == len(files) - 1:
            notes += tuple(f"{name} is not read: {WEIGHTS_NAME} has the weights" for name in others)
            files = [folder / WEIGHTS_NAME]
    if len(files) > 1 or SHARD_NAME.fullmatch(files[0].name):
        return WeightFiles(_shards_without_index(folder, files), notes)
    return WeightFiles(dict.fromkeys(read_header(files[0]), files[0]), notes)


def _shards_without_index(folder: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Returns the file of each tensor of shards whose names have their number, such as `model-00001-of-00002`."""
    names = [SHARD_NAME.fullmatch(path.name) for path in files]
    if not all(names) or len({(name["stem"], name["count"]) for name in names if name}) > 1:
        raise CheckpointError(
            f"{folder} has {len(files)} *.safetensors files and no {INDEX_NAME}: "
            f"{listed(path.name for path in files)}. Download the index, or keep one file."
        )
    first = next(name for name in names if name)
    count = int(first["count"])
    _check_all_exist(
        folder, [f"{first['stem']}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )
    found: dict[str, Path] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor in found:
                raise WeightsError(
                    f"{folder}: two shards have {tensor} (got {found[tensor].name} and {file.name}). Download the "
                    "checkpoint again."
                )
            found[tensor] = file
    return found


def _check_all_exist(folder: Path, names: Sequence[str]) -> None:
    """Raises WeightsError unless every shard exists."""
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {listed(missing)}. Download the checkpoint "
            "again."
        )


def read_weight_map(folder: Path, error: type[FastVLMError]) -> dict[str, str]:
    """Returns the name of each tensor's file from the index of a folder. Raises `error`."""
    weight_map = read_json_object(folder / INDEX_NAME, error).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in names):
        raise error(f"{folder / INDEX_NAME}: 'weight_map' must map tensor names to file names")
    for name in sorted(set(names)):
        if Path(name).name != name:
            raise error(f"{folder / INDEX_NAME} names a file outside the folder: {name!r:.80}")
    return weight_map


def _indexed_files(folder: Path) -> dict[str, Path]:
    weight_map = read_weight_map(folder, WeightsError)
    names = sorted(set(weight_map.values()))
    _check_all_exist(folder, names)
    headers = {name: read_header(folder / name) for name in names}
    absent = sorted(tensor for tensor, file in weight_map.items() if tensor not in headers[file])
    unlisted = sorted({tensor for header in headers.values() for tensor in header} - weight_map.keys())
    if len(absent) == 1 and not unlisted and absent[0].endswith(HEAD_NAME):
        del weight_map[absent[0]]  # whether the embeddings are tied is decided with the config
    elif absent or unlisted:
        raise WeightsError(
            f"{folder / INDEX_NAME} and the shards disagree on {len(absent) + len(unlisted)} tensors: "
            f"{listed(absent + unlisted)}. Download the checkpoint again."
        )
    return {tensor: folder / file for tensor, file in weight_map.items()}


def not_a_checkpoint(folder: Path, missing: str) -> CheckpointError:
    """Returns the error for a folder without `missing`, a file's name: what the folder is, and what to do."""
    text = f"{folder} is not a checkpoint: it has no {missing}"
    names = sorted(path.name for path in folder.iterdir() if not is_system_file(path))
    known, inside, pickles = foreign_folder(folder), checkpoints_inside(folder), pickles_in(folder)
    if pickles and (known is None or not matches(pickles[0].name, known.patterns)):
        return CheckpointError(
            f"{text} (found the pickle {pickles[0].name}, which can run arbitrary code when it is opened). Pass "
            "allow_pickle=True to read it in a process of its own, as tensors only, or convert it with "
            "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')`.",
            "allow_pickle",
        )
    if known is not None:
        return CheckpointError(f"{text}. It is {known.what} (got {listed(names)}). {known.remedy}", *known.arguments)
    if inside:
        return CheckpointError(f"{text}. Pass a checkpoint inside it (got {listed(inside)}).")
    return CheckpointError(f"{text} ({f'found {listed(names)}' if names else 'the folder is empty'})")


def write_weights(folder: Path, tensors: Iterable[tuple[str, mx.array]]) -> None:
    """Writes MLX arrays to `model.safetensors`, or to shards with an index. Holds one shard in memory at a time."""
    from ._mlx import mx

    def write(path: Path, shard: Mapping[str, mx.array]) -> None:
        write_safetensors(path, shard, {"format": "mlx"})

    write_shards(folder, tensors, write, evaluate=mx.eval)  # evaluated arrays release what they were made from


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Any]],
    write: Callable[[Path, Mapping[str, Any]], None],
    evaluate: Callable[[Any], object] | None = None,
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, with `write` for each file.

    A tensor has `nbytes`, as those of MLX, torch and numpy do. `evaluate` is called with each one just before its
    shard keeps it.
    """
    shards: list[list[str]] = []
    pending: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > MAX_SHARD_BYTES:
            write(_shard_path(folder, len(shards)), pending)
            shards.append(list(pending))
            pending, size = {}, 0
        if evaluate is not None:
            evaluate(tensor)
        pending[name] = tensor
        size += tensor.nbytes
    write(_shard_path(folder, len(shards)), pending)
    _name_shards(folder, [*shards, list(pending)])


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    """Renames the shards as Hugging Face does, with the number of shards in each name, and writes their index."""
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / WEIGHTS_NAME)
        return
    weight_map, total = {}, 0
    for index, names in enumerate(shards):
        path = folder / f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _shard_path(folder, index).rename(path)
        total += path.stat().st_size
        weight_map.update(dict.fromkeys(names, path.name))
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes MLX arrays, bfloat16 included, one at a time. Equal tensors give equal bytes.

    The library's own writer goes through numpy, which has no bfloat16. Wide types come first, so that all are aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": MLX_DTYPES[str(tensor.dtype).removeprefix("mlx.core.")],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(_raw_bytes(tensors[name]))


def _raw_bytes(tensor: mx.array) -> bytes:
    """Returns the bytes of an array, row by row."""
    import numpy as np

    from ._mlx import mx

    plain = tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor
    return np.array(plain, copy=False).tobytes()
