"""PyTorch pickles as safetensors. Each is read in a process of its own, as tensors only, within bounds.

A pickle is a program. `torch.load(weights_only=True)` runs only the few operations that build tensors, but its checks
have had holes. So a reading is asked for (`allow_pickle`), has its own process without the caller's tokens and keys,
and is limited in time, in memory (Linux) and in the size of what it writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FastVLMError, WeightsError
from .files import check_space, is_file, read_json_object, write_json
from .foreign_files import pickles_in
from .safetensors_files import INDEX_NAME, WEIGHTS_NAME, not_a_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.bin")

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""The keys under which trainers nest the tensors."""
MAX_NESTING = 3
"""The deepest such nesting that is followed."""

START_SECONDS = 120.0
"""The time to start Python and torch, in seconds, with a slow disk."""
BYTES_PER_SECOND = 10e6
"""The slowest reading that is waited for, in bytes per second."""
MEMORY_BYTES = 12 * 2**30
"""The address space of the process in addition to three times the pickle, in bytes. torch alone maps several GiB."""
KEPT_VARIABLES = re.compile(
    r"(PATH|HOME|LANG|LC_\w+|TMPDIR|VIRTUAL_ENV|PYTHONPATH|PYTHONHOME|SYSTEMROOT|OMP_NUM_THREADS|(DY)?LD_LIBRARY_PATH)"
)
"""The environment of the process. Tokens and keys are left out."""


def weights_as_safetensors(folder: Path, target: Path) -> None:
    """Writes the pickled weights of a checkpoint folder to `target` as `model.safetensors`, or as shards and an index.

    Raises:
        CheckpointError: the folder has no pickled weights, or several that could be the weights.
        WeightsError: a pickle is damaged, or holds something else than tensors.
    """
    shards = _pickled_shards(folder)
    check_space(target, sum(path.stat().st_size for path in shards))
    if len(shards) == 1:
        as_safetensors(shards[0], target / WEIGHTS_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(as_safetensors(shard, target / name), name))
    write_json(target / INDEX_NAME, {"weight_map": weight_map})


def _pickled_shards(folder: Path) -> list[Path]:
    """Returns the pickles that together are the weights of a folder."""
    found = pickles_in(folder)
    if is_file(folder / PICKLE_INDEX):
        weight_map = read_json_object(folder / PICKLE_INDEX, WeightsError).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, Mapping) else []
        missing = [name for name in names if Path(name).name != name or not is_file(folder / name)]
        if not names or missing:
            raise WeightsError(
                f"{folder / PICKLE_INDEX}: the shards must be in the folder (got {', '.join(missing) or 'no names'}). "
                "Download the checkpoint again."
            )
        return [folder / name for name in names]
    if folder / PICKLE_NAME in found:
        return [folder / PICKLE_NAME]
    if len({match[1] if (match := PICKLE_SHARD.fullmatch(path.name)) else path.name for path in found}) == 1:
        return found
    raise not_a_checkpoint(folder, PICKLE_NAME if found else "weights")


def as_safetensors(pickle: Path, target: Path) -> list[str]:
    """Writes the tensors of a pickle to `target`, and returns their names.

    Raises:
        WeightsError: the pickle is damaged, holds something else than tensors, or exceeds a bound.
    """
    size = pickle.stat().st_size
    command = [sys.executable, "-m", __name__, str(pickle.absolute()), str(target.absolute()), str(size)]
    environment = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    seconds = START_SECONDS + size / BYTES_PER_SECOND
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise WeightsError(f"{pickle} is not read after {seconds:.0f} s: it is broken or hostile.") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # killed by the system, or by a bound
        raise WeightsError(
            f"{pickle} cannot be read: its process ended with {done.returncode}. Convert it to safetensors where it "
            "was made."
        ) from None
    if "error" in answer:
        raise WeightsError(
            f"{pickle} cannot be read as tensors only ({answer['error']:.200}). Convert it to safetensors where it was "
            "made."
        )
    return list(answer["names"])


def main(arguments: Sequence[str]) -> None:
    """Runs in the process: reads a pickle, writes safetensors, and prints the names or an error as JSON."""
    pickle, target, size = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    try:
        _limit(size)
        names = _convert(pickle, target)
    except Exception as reason:  # damaged bytes raise any exception
        text = str(reason).strip().splitlines() or [type(reason).__name__]
        print(json.dumps({"error": text[0]}))
        return
    print(json.dumps({"names": names}))


def _limit(size: int) -> None:
    """Bounds the written bytes, and on Linux the address space, of this process."""
    import resource

    written = 2 * size + 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (3 * size + MEMORY_BYTES, 3 * size + MEMORY_BYTES))


def _convert(pickle: Path, target: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
        content = torch.load(pickle, map_location="cpu", weights_only=True)
    tensors = dict(_owned(_state(content)))
    save_file(tensors, target, metadata={"format": "pt"})
    return sorted(tensors)


def _state(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """Returns the tensors of a state dict, perhaps nested. Raises FastVLMError if there are none."""
    import torch

    if isinstance(content, Mapping):
        found = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if found:
            return found
        for key in STATE_KEYS:
            if depth < MAX_NESTING and isinstance(content.get(key), Mapping):
                return _state(content[key], depth + 1)
    raise FastVLMError("it has no tensors by name")


def _owned(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor with memory of its own, which safetensors requires. Tied tensors are copied."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        yield name, tensor if whole and tensor.data_ptr() not in seen else tensor.contiguous().clone()
        seen.add(tensor.data_ptr())


if __name__ == "__main__":
    main(sys.argv[1:])
