"""The safetensors files of a checkpoint folder: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError, WeightsError
from .json_file import read_json_object
from .safetensors_header import read_header

MAX_LISTED_NAMES = 6
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor. Raises CheckpointError or WeightsError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(folder, read_json_object(index, WeightsError).get("weight_map"))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors, so it is no checkpoint; {what_is_there(folder)}")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} *.safetensors files without model.safetensors.index.json: "
            "fetch the index, or leave the one file that counts"
        )
    return dict.fromkeys(read_header(files[0]), files[0])


def what_is_there(folder: Path) -> str:
    """For a message about a folder that is no checkpoint."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"found the pickle {pickles[0]}, which can run foreign code when it is opened: convert it first, with "
            "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')`"
        )
    return f"found {listed(names)}" if names else "the folder is empty"


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return ", ".join(names[:MAX_LISTED_NAMES]) + more


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
            f"{listed(absent + unlisted)}; fetch the checkpoint again"
        )
    return {tensor: folder / file for tensor, file in weight_map.items()}
