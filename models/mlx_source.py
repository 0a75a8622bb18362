"""An mlx-vlm folder (mlx-community's, mlx-swift-lm's) seen as Apple's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, WeightsError
from .mlx_layout import ENCODER_PREFIX, apple_name, to_apple_axes
from .quantization import Quantization
from .safetensors_header import TensorInfo
from .tensor_views import View, expanded, permuted

Shape = tuple[int, ...]

OWN_FIELDS = ("text_config", "vision_config", "quantization", "quantization_config", "image_token_index")
"""Of mlx-vlm's `config.json`, which Apple's has not. The image token is the sentinel -200."""


def mlx_views(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, View]:
    """How each of Apple's tensors stands in an mlx-vlm folder: convolutions channels-last, matrices maybe quantized.

    Raises:
        WeightsError: convolutions lie both ways, or groups lack their scales, biases or description.
        ConfigError: the description is malformed.
    """
    encoder = {name: info.shape for name, info in tensors.items() if name.startswith(ENCODER_PREFIX)}
    channels_last = is_channels_last(encoder)
    quantization = _quantization(tensors, config)
    views: dict[str, View] = {}
    for name, info in tensors.items():
        layer = name.rpartition(".")[0]
        packed = f"{layer}.scales" in tensors
        if packed and name.endswith((".scales", ".biases")):
            continue
        if packed and name.endswith(".weight") and quantization is not None:
            view = expanded(name, info, quantization.of(layer))
        elif channels_last and name in encoder and len(info.shape) in (3, 4):
            view = permuted(name, info, to_apple_axes(info.shape))
        else:
            view = View(name, info)
        views[_apple_name(name)] = view
    return views


def is_channels_last(shapes: Mapping[str, Shape]) -> bool:
    """Whether the encoder's convolutions are channels-last, as all its depthwise kernels say together.

    A kernel (C, 7, 7, 1) is channels-last, a (C, 1, 7, 7) is not; 1x1 kernels and full ones may be either.

    Raises:
        WeightsError: some say one thing and some the other, or none says anything.
    """
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    last = sorted(name for name, shape in kernels.items() if shape[1] == shape[2] > 1 == shape[3])
    first = sorted(name for name, shape in kernels.items() if shape[2] == shape[3] > 1 == shape[1])
    if bool(last) == bool(first):
        found = f"{last[0]} is channels-last, {first[0]} is not" if last else "it has no depthwise convolution"
        raise WeightsError(f"the vision encoder's convolutions should all lie one way; {found}")
    return bool(last)


def apple_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Apple's `config.json`: mlx-vlm keeps its fields at the top, or in `text_config`. Raises ConfigError."""
    text, vision = (config.get(key) or {} for key in ("text_config", "vision_config"))
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError("config.json: text_config and vision_config should be objects")
    own = {key: value for key, value in config.items() if key not in OWN_FIELDS}
    apple = {**{key: value for key, value in text.items() if value is not None}, **own, "model_type": "llava_qwen2"}
    if "mm_vision_tower" not in apple and isinstance(vision.get("image_size"), int):
        apple["mm_vision_tower"] = f"mobileclip_l_{vision['image_size']}"
    return apple


def quantization_note(views: Mapping[str, View]) -> tuple[str, ...]:
    """What a user should know of a checkpoint whose weights were rounded before."""
    bits = {view.affine.bits for view in views.values() if view.affine is not None}
    if not bits:
        return ()
    named = " and ".join(str(count) for count in sorted(bits))
    return (f"the checkpoint is quantized to {named} bits: what it is exported to builds on the rounded weights",)


def _apple_name(name: str) -> str:
    """Some converters leave the head outside of `language_model`. Raises WeightsError for a name of no known part."""
    if name.startswith("lm_head."):
        return name
    try:
        return apple_name(name)
    except KeyError:
        raise WeightsError(
            f"{name!r:.80} is no tensor of mlx-vlm's FastVLM layout: fetch the checkpoint again"
        ) from None


def _quantization(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Quantization | None:
    """The description of quantized groups, checked against the tensors."""
    layers = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not layers:
        return None
    described = config.get("quantization") or config.get("quantization_config")
    if not isinstance(described, Mapping):
        raise WeightsError(
            f"{len(layers)} layers are quantized (they have .scales), but config.json names no 'quantization'"
        )
    quantization = Quantization.from_dict(described)
    for layer in layers:
        _check_groups(tensors, layer, quantization)
    return quantization


def _check_groups(tensors: Mapping[str, TensorInfo], layer: str, quantization: Quantization) -> None:
    parts = [tensors.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
    if any(part is None or len(part.shape) != 2 for part in parts):
        raise WeightsError(f"{layer} should have packed .weight, .scales and .biases: fetch the checkpoint again")
    packed, scales, biases = (part for part in parts if part is not None)
    affine = quantization.of(layer)
    columns = packed.shape[1] * 32 // affine.bits
    if packed.dtype != "U32" or scales != biases or scales.shape != (packed.shape[0], columns // affine.group_size):
        raise WeightsError(
            f"{layer} does not hold groups of {affine.group_size} with {affine.bits} bits, as config.json says: "
            f"its scales have shape {list(scales.shape)}"
        )
