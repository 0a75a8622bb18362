"""What stands where in an exported model folder: the one hand-over point between `export` and `runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .apple_layout import renamed
from .checkpoint import load_lazily, read_header
from .errors import ModelFolderError
from .json_file import read_json_object
from .mlx_layout import ENCODER_PREFIX

if TYPE_CHECKING:
    from ._mlx import mx

PACKAGE_NAME = "fastvithd.mlpackage"
INPUT_NAME = "images"
"""The package's input: pixels (1, 3, S, S) in 0..1, float32 or float16, or an RGB image of S x S."""
OUTPUT_NAME = "image_features"
"""The package's output, (1, (S / 64)^2, C), float32 or float16."""
EMBEDS_NAME = "image_embeds"
"""The output of a package that holds the projector too, (1, (S / 64)^2, D). It has another name than `image_features`:
a client that projects itself fails over the name at once, and not later over a shape."""

IMAGE_TOKEN = "<image>"
"""The token that stands for an image, in prompts and in the exported tokenizer."""

CLIENT_PREFIXES = (("multi_modal_projector.linear_", "mm_projector."),)
"""Our prefix -> mlx-vlm's, where they differ."""
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "ACKNOWLEDGEMENTS*", "NOTICE*")
"""What goes along with weights wherever they go."""
MANIFEST_NAME = "fastvlm.json"
MANIFEST_FORMAT = 1
"""Raised when a manifest changes in a way that an older reader would misread."""


def saved_weights(folder: Path) -> dict[str, mx.array]:
    """Decoder and projector by saved name, each read from disk when it is first evaluated.

    Raises:
        ModelFolderError: there are no weights, or the index names other files than there are.
        WeightsError: a file is damaged.
    """
    weights = _all_weights(folder)
    return {own_name(name): weights[name] for name in weights if not name.startswith(ENCODER_PREFIX)}


def saved_encoder(folder: Path) -> dict[str, mx.array]:
    """The tensors of the encoder in MLX by their names without the tower's prefix; none where there is a package.

    Raises as `saved_weights`.
    """
    weights = _all_weights(folder)
    return {name.removeprefix(ENCODER_PREFIX): weights[name] for name in weights if name.startswith(ENCODER_PREFIX)}


def has_mlx_encoder(folder: Path) -> bool:
    """Whether the folder holds the encoder in MLX, beside the decoder; only headers are read.

    Raises:
        WeightsError: a file is damaged.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return False
    return any(name.startswith(ENCODER_PREFIX) for file in weight_files(folder) for name in read_header(file))


def _all_weights(folder: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        read_header(file)  # MLX would only notice a truncated file when it reads the last tensor
        weights.update(load_lazily(file))
    return weights


def client_name(saved_name: str) -> str:
    """What mlx-vlm calls a tensor of decoder or projector: so it stands beside an encoder in MLX."""
    return renamed(saved_name, CLIENT_PREFIXES)


def own_name(client_name: str) -> str:
    """The other way round."""
    return renamed(client_name, tuple((client, own) for own, client in CLIENT_PREFIXES))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold decoder, projector and, in MLX, the encoder. Raises ModelFolderError."""
    if not (folder / INDEX_NAME).is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise ModelFolderError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: it has no decoder")
        return [folder / WEIGHTS_NAME]
    weight_map = read_json_object(folder / INDEX_NAME, ModelFolderError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelFolderError(f"{folder / INDEX_NAME} should map tensor names to files in the folder ('weight_map')")
    return [folder / name for name in sorted(set(names))]
