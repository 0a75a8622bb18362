"""The files and names of an exported model folder, the one interface between `export` and `runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import load_lazily
from .errors import ModelFolderError
from .safetensors_files import INDEX_NAME, WEIGHTS_NAME, read_header, read_weight_map
from .tensor_names import MLX_ENCODER_PREFIX, rename

if TYPE_CHECKING:
    from ._mlx import mx

PACKAGE_NAME = "fastvithd.mlpackage"
ASSET_NAME = "fastvithd.aimodel"
"""The encoder for Core AI, the successor of Core ML: experimental, next to the package or instead of it."""
ASSET_SYSTEMS = "macOS 27, iOS 27 and later"
"""The systems that load it."""
INPUT_NAME = "images"
"""The package's input. Its value is pixels (1, 3, S, S) in 0..1, float32 or float16, or an RGB image of S x S."""
OUTPUT_NAME = "image_features"
"""The package's output, (1, (S / 64)^2, C), float32 or float16."""
EMBEDS_NAME = "image_embeds"
"""The output of a package with the projector, (1, (S / 64)^2, D). Its name differs from `image_features`: a client
with a projector of its own then fails at the name, not later at a shape."""

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "ACKNOWLEDGEMENTS*", "NOTICE*")
"""The patterns of the files that accompany weights wherever they are copied."""
MANIFEST_NAME = "fastvlm.json"
MANIFEST_FORMAT = 1
"""The version of the manifest. It increases with each change that an older reader would misread."""


def saved_weights(folder: Path) -> dict[str, mx.array]:
    """Returns decoder and projector by saved name, each read from disk when it is first evaluated.

    Raises:
        ModelFolderError: the weights are missing, or the index names other files.
        WeightsError: a file is damaged.
    """
    weights = _all_weights(folder)
    names = rename((name for name in weights if not name.startswith(MLX_ENCODER_PREFIX)), "mlx", "saved")
    return {saved: weights[name] for name, saved in names.items()}


def saved_encoder(folder: Path) -> dict[str, mx.array]:
    """Returns the tensors of an encoder in MLX, without the prefix. They are absent from a folder with a package.

    Raises the same errors as `saved_weights`.
    """
    weights = _all_weights(folder)
    return {
        name.removeprefix(MLX_ENCODER_PREFIX): weights[name] for name in weights if name.startswith(MLX_ENCODER_PREFIX)
    }


def has_mlx_encoder(folder: Path) -> bool:
    """Returns True if the folder has the encoder in MLX. Reads only the headers.

    Raises:
        WeightsError: a file is damaged.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return False
    return any(name.startswith(MLX_ENCODER_PREFIX) for file in weight_files(folder) for name in read_header(file))


def _all_weights(folder: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        read_header(file)  # MLX detects a truncated file only at its last tensor
        weights.update(load_lazily(file))
    return weights


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of decoder, projector and, in MLX, encoder. Raises ModelFolderError."""
    if not (folder / INDEX_NAME).is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise ModelFolderError(f"{folder} has no decoder: {WEIGHTS_NAME} and {INDEX_NAME} are missing")
        return [folder / WEIGHTS_NAME]
    names = sorted(set(read_weight_map(folder, ModelFolderError).values()))
    if not names:
        raise ModelFolderError(f"{folder / INDEX_NAME}: 'weight_map' is empty")
    return [folder / name for name in names]


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files under a folder. 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
