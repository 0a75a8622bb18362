"""The layouts that checkpoints come in, told from what is in the folder, and each seen as Apple's LLaVA layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hf_config, mlx_source
from .apple_layout import APPLE_ENCODER_PREFIX
from .errors import CheckpointError, ConfigError
from .hf_layout import HF_ENCODER_PREFIX, apple_names_of_hf
from .json_file import read_json_object
from .mlx_layout import ENCODER_PREFIX as MLX_ENCODER_PREFIX
from .safetensors_header import TensorInfo
from .tensor_views import View
from .weight_files import listed

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Source:
    """A checkpoint folder as Apple's layout has it."""

    layout: str
    config: dict[str, Any]
    """Apple's fields."""
    views: dict[str, View]
    """How each tensor is read, by Apple's name."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A layout: how it is recognised, and how it is read."""

    title: str
    encoder_prefix: str
    model_types: tuple[str, ...]
    read: Callable[[Path, Mapping[str, Any], Tensors], Source]


def open_source(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    """What `config.json` and the tensors of a folder make together.

    Raises:
        CheckpointError: the layout is none that is read here; the message tells what was found.
        ConfigError: `config.json` belongs to another layout than the tensors, or is malformed.
        WeightsError: a tensor cannot be read as its layout says.
    """
    if any(name.startswith("multi_modal_projector.linear_0.") for name in tensors):
        raise CheckpointError(
            f"{folder} is an exported model folder: use it as it is with `fastvlm generate`, or pass the checkpoint "
            "that it was made from"
        )
    found = [layout for layout in LAYOUTS if any(name.startswith(layout.encoder_prefix) for name in tensors)]
    if len(found) > 1:
        raise CheckpointError(f"{folder} mixes tensors of the layouts {' and '.join(layout.title for layout in found)}")
    if not found:
        raise CheckpointError(_unknown(folder, config, tensors))
    layout, model_type = found[0], config.get("model_type")
    if model_type not in layout.model_types:
        wanted = " or ".join(map(repr, layout.model_types))
        raise ConfigError(
            f"config.json: model_type should be {wanted}, as the tensors are in the {layout.title} layout; "
            f"found {model_type!r:.80}"
        )
    return layout.read(folder, config, tensors)


def _read_apple(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    return Source("Apple LLaVA", dict(config), {name: View(name, info) for name, info in tensors.items()})


def _read_hf(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    views = {apple: View(name, tensors[name]) for name, apple in apple_names_of_hf(tensors).items()}
    names = ("preprocessor_config.json", "tokenizer_config.json")
    files = {name: read_json_object(folder / name) for name in names if (folder / name).is_file()}
    apple, notes = hf_config.apple_config(config, views.keys(), files)
    return Source("Hugging Face native", apple, views, notes)


def _read_mlx(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    views = mlx_source.mlx_views(tensors, config)
    return Source("mlx-vlm", mlx_source.apple_config(config), views, mlx_source.quantization_note(views))


LAYOUTS = (
    Layout("Apple LLaVA", APPLE_ENCODER_PREFIX, ("llava_qwen2",), _read_apple),
    Layout("Hugging Face native", HF_ENCODER_PREFIX, ("fast_vlm",), _read_hf),
    Layout("mlx-vlm", MLX_ENCODER_PREFIX, ("llava_qwen2", "fastvlm"), _read_mlx),
)


def _unknown(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> str:
    if any(name.startswith("language_model.model.") for name in tensors):
        return f"{folder} holds a decoder without a vision encoder: pass a whole FastVLM checkpoint"
    return (
        f"{folder} is no FastVLM checkpoint in a layout that is read here "
        f"({', '.join(layout.title for layout in LAYOUTS)}): no tensor is named as its vision encoder's; "
        f"found model_type {config.get('model_type')!r:.40} and tensors such as {listed(sorted(tensors)[:3])}"
    )
