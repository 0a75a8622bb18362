"""The layouts that checkpoints come in, each read as Apple's LLaVA layout: names, shapes, axes and `config.json`.

A layout is recognized by its tensors, never by the name of the folder:

| layout | tensors | `config.json` |
|---|---|---|
| Apple LLaVA | as they are | as it is |
| Hugging Face native (`fast_vlm`) | renamed | `text_config`, `vision_config`, and the image size elsewhere |
| mlx-vlm (mlx-community, mlx-swift-lm) | renamed, channels-last, perhaps quantized | Apple's fields, perhaps nested |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import PATCH_SIZE, TRAINED_IMAGE_SIZE
from .errors import CheckpointError, ConfigError, WeightsError, listed
from .files import field, read_json_object
from .quantization import Affine, Quantization
from .safetensors_files import Shape, TensorInfo
from .tensor_names import (
    APPLE_ENCODER_PREFIX,
    HF_ENCODER_PREFIX,
    MLX_ENCODER_PREFIX,
    is_known,
    rename,
    to_apple_axes,
)

Tensors = Mapping[str, TensorInfo]
Framework = Literal["pt", "mlx"]
ReadRaw = Callable[[str, Framework], Any]
"""A function from a tensor's name in the file and the framework to the array as it is stored."""

LLAVA_IMAGE_TOKENS = 576
"""The `image_seq_length` of files that only repeat the default of LLaVA's class, where it has no meaning."""
NO_LIMIT = 10**9
"""The smallest `model_max_length` that means no limit."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""The files that may have the image processor: nested in the first since transformers 5, in the second before."""
PIXEL_SCALE = 1 / 255
"""The factor from 8-bit values to FastVLM's pixels, which are in 0..1."""
BICUBIC = 3
"""Pillow's number of the bicubic filter."""

TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings", "max_window_layers",
    "hidden_act", "attention_dropout", "initializer_range", "use_sliding_window", "sliding_window", "use_cache",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
"""The fields of Hugging Face's `text_config` that Apple has at the top level."""

MLX_FIELDS = ("text_config", "vision_config", "quantization", "quantization_config", "image_token_index")
"""The fields of mlx-vlm's `config.json` that Apple does not have. Its image token is the sentinel -200."""


@dataclass(frozen=True)
class View:
    """A tensor in Apple's layout, and how to read it from its file."""

    name: str
    """The name in the file."""
    info: TensorInfo
    """The shape and dtype in Apple's layout."""
    permutation: tuple[int, ...] | None = None
    """The order of the file's axes in Apple's layout."""
    affine: Affine | None = None
    """The quantization of a packed matrix, whose `.scales` and `.biases` are in the same folder."""

    def read(self, read_raw: ReadRaw, framework: Framework) -> Any:
        """Returns an array for `torch.as_tensor` (pt) or `mx.array` (mlx). Dequantized matrices are float32."""
        if self.affine is not None:
            return self._dequantized(read_raw, self.affine)
        values = read_raw(self.name, framework)
        if self.permutation is None:
            return values
        return values.permute(self.permutation) if framework == "pt" else values.transpose(self.permutation)

    def _dequantized(self, read_raw: ReadRaw, affine: Affine) -> Any:
        import numpy as np

        from ._mlx import mx
        from .mlx_cpu import dequantize

        layer = self.name.removesuffix(".weight")
        packed, scales, biases = (read_raw(f"{layer}.{part}", "mlx") for part in ("weight", "scales", "biases"))
        scales, biases = (part.astype(mx.float32) for part in (scales, biases))
        return np.array(dequantize(packed, scales, biases, affine))


@dataclass(frozen=True)
class Source:
    """A checkpoint folder as Apple's layout has it."""

    layout: str
    config: dict[str, Any]
    """The content of `config.json` in Apple's fields."""
    views: dict[str, View]
    """The view of each tensor, by Apple's name."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceLayout:
    """A layout: how it is recognized, and how it is read."""

    title: str
    encoder_prefix: str
    model_types: tuple[str, ...]
    read: Callable[[Path, Mapping[str, Any], Tensors], Source]


def open_source(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    """Returns the checkpoint that `config.json` and the tensors of a folder make together.

    Raises:
        CheckpointError: the layout is unknown. The message has what was found.
        ConfigError: `config.json` belongs to another layout than the tensors, or is malformed.
        WeightsError: a tensor cannot be read as its layout requires.
    """
    if any(name.startswith("multi_modal_projector.linear_0.") for name in tensors):
        raise CheckpointError(
            f"{folder} is an exported model folder. Use it with `fastvlm generate`, or pass the checkpoint that it was "
            "exported from."
        )
    found = [layout for layout in LAYOUTS if any(name.startswith(layout.encoder_prefix) for name in tensors)]
    if len(found) > 1:
        raise CheckpointError(f"{folder} mixes tensors of the layouts {' and '.join(layout.title for layout in found)}")
    if not found:
        raise CheckpointError(_unknown_layout(folder, config, tensors), "base")
    layout, model_type = found[0], config.get("model_type")
    if model_type not in layout.model_types:
        wanted = " or ".join(map(repr, layout.model_types))
        raise ConfigError(
            f"config.json: model_type must be {wanted} for tensors in the {layout.title} layout, got {model_type!r:.80}"
        )
    return layout.read(folder, config, tensors)


def _read_apple(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    own = {key: value for key, value in config.items() if key != "quantization_config"}  # its weights are refused
    own["model_type"] = "llava_qwen2"
    return Source("Apple LLaVA", own, {name: View(name, info) for name, info in tensors.items()})


def _read_hf(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    views = {apple: View(name, tensors[name]) for name, apple in rename(tensors, "hf", "apple").items()}
    names = (*PROCESSOR_FILES, "tokenizer_config.json")
    files = {name: read_json_object(folder / name) for name in names if (folder / name).is_file()}
    apple, notes = config_of_hf(config, views.keys(), files)
    return Source("Hugging Face native", apple, views, notes)


def _read_mlx(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Source:
    views = views_of_mlx(tensors, config)
    return Source("mlx-vlm", config_of_mlx(config), views, _quantization_note(views))


LAYOUTS = (
    SourceLayout("Apple LLaVA", APPLE_ENCODER_PREFIX, ("llava_qwen2", "llava_qwen"), _read_apple),  # LLaVA-NeXT's name
    SourceLayout("Hugging Face native", HF_ENCODER_PREFIX, ("fast_vlm",), _read_hf),
    SourceLayout("mlx-vlm", MLX_ENCODER_PREFIX, ("llava_qwen2", "fastvlm"), _read_mlx),
)


TOWERS = {
    "vision_model.encoder.layers.": "CLIP or SigLIP",
    "vision_model.embeddings.": "CLIP or SigLIP",
    "visual.blocks.": "Qwen-VL",
    "vision_model.radio_model.": "RADIO",
    "convnext": "ConvNeXt",
}
"""The vision encoders of other models, by a sign in the names of their tensors."""

PART_SIGNS = {"a decoder": "layers.0.self_attn.", "a projector": "projector."}
"""The parts that trainers save alone, by a sign in the names of their tensors."""


def _unknown_layout(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> str:
    tower = next((tower for sign, tower in TOWERS.items() if any(sign in name for name in tensors)), None)
    if tower is not None:
        return f"{folder} is another model: its vision encoder is that of {tower}. FastVLM's is FastViTHD."
    missing = [
        part
        for part, signs in (("a vision encoder", ("vision_tower.",)), ("a decoder", ("embed_tokens.", "layers.0.")))
        if not any(sign in name for name in tensors for sign in signs)
    ]
    present = [part for part, sign in PART_SIGNS.items() if any(sign in name for name in tensors)]
    if missing and present:
        return (
            f"{folder} has {' and '.join(present)} without {' and '.join(missing)}. Pass the checkpoint that it was "
            "trained on with base=MODEL."
        )
    return (
        f"{folder} is not a FastVLM checkpoint in a supported layout "
        f"({', '.join(layout.title for layout in LAYOUTS)}): no tensor has the name of a vision encoder's "
        f"(got model_type {config.get('model_type')!r:.40} and tensors such as {listed(sorted(tensors)[:3])})"
    )


# Hugging Face native


def config_of_hf(
    config: Mapping[str, Any], tensors: Collection[str], files: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns Apple's `config.json`, and notes on contradictions and assumptions.

    `tensors` are Apple's names of the checkpoint's tensors. `files` has the folder's other JSON files, by name.

    Raises:
        ConfigError: a field is missing, malformed, or asks for something that FastVLM does not do.
    """
    text, vision = _object(config, "text_config"), _object(config, "vision_config")
    for key, wanted in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full")):
        if field(config, key, str, wanted) != wanted:
            raise ConfigError(f"config.json: {key} must be {wanted!r}, got {config[key]!r:.40}")
    if field(config, "vision_feature_layer", int, -1) != -1:
        raise ConfigError(f"config.json: vision_feature_layer must be -1, got {config['vision_feature_layer']!r:.40}")
    image_size, assumed = _image_size(config, *image_processor(files))
    tied, contradicted = _tied(config, text, "lm_head.weight" in tensors)
    limit = files.get("tokenizer_config.json", {}).get("model_max_length")
    apple = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **{key: text[key] for key in TEXT_FIELDS if text.get(key) is not None},
        "image_aspect_ratio": field(config, "image_aspect_ratio", str, "crop"),  # its image processor crops
        "mm_hidden_size": field(vision, "hidden_size", int),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "tie_word_embeddings": tied,
        "tokenizer_padding_side": "right",
    }
    if isinstance(limit, int) and limit < NO_LIMIT:
        apple["tokenizer_model_max_length"] = limit
    for key in ("image_token_index", "image_token_id"):
        if config.get(key) is not None:
            apple["image_token_index"] = field(config, key, int)
    if apple.get("eos_token_id") is None and config.get("eos_token_id") is not None:
        apple["eos_token_id"] = config["eos_token_id"]
    return apple, (*assumed, *contradicted)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object, got {value!r:.40}")
    return value


def image_processor(files: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Returns the file that has the image processor, and its fields. The nested form of transformers 5 comes first."""
    nested = files.get(PROCESSOR_FILES[0], {}).get("image_processor")
    if isinstance(nested, Mapping):
        return PROCESSOR_FILES[0], nested
    return PROCESSOR_FILES[1], files.get(PROCESSOR_FILES[1], {})


def _image_size(config: Mapping[str, Any], file: str, processor: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Returns the side of the image processor's square, in pixels. Without one, the token count implies it."""
    notes = _pixel_notes(file, processor)
    for key in ("crop_size", "size"):
        size = processor.get(key)
        edges = list(size.values()) if isinstance(size, Mapping) else [] if size is None else [size]
        whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
        if not whole or len(set(edges)) > 1:
            raise ConfigError(f"{file}: {key} must be a square's side, got {size!r:.80}")
        if edges:
            return edges[0], notes
    tokens = field(config, "image_seq_length", int, LLAVA_IMAGE_TOKENS)
    side = math.isqrt(max(tokens, 0))
    if tokens not in (0, LLAVA_IMAGE_TOKENS) and side * side == tokens:
        return side * PATCH_SIZE, notes
    return TRAINED_IMAGE_SIZE, (
        *notes,
        f"the folder has no image size in {' or '.join(PROCESSOR_FILES)}: images of {TRAINED_IMAGE_SIZE} px are "
        "assumed, FastVLM's training size (image_size sets another)",
    )


def _pixel_notes(file: str, processor: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns notes on how the processor makes the square. Raises ConfigError for other pixels than FastVLM's.

    The exported package takes RGB in 0..1, so a checkpoint that was trained on normalized pixels would answer wrongly.
    """
    factor = processor.get("rescale_factor", PIXEL_SCALE) if processor.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or abs(factor - PIXEL_SCALE) > 1e-6:
        raise ConfigError(
            f"{file}: pixels must be scaled by 1/255, got {factor!r:.40}. FastVLM's encoder takes pixels in 0..1."
        )
    if processor.get("do_normalize", True):
        for key, wanted in (("image_mean", 0), ("image_std", 1)):
            values = processor.get(key)
            values = values if isinstance(values, list) else [wanted if values is None else values]
            if any(value != wanted for value in values):
                raise ConfigError(
                    f"{file}: {key} must be {wanted}, got {values!r:.80}. FastVLM's encoder takes pixels in 0..1."
                )
    notes = []
    if processor.get("do_center_crop") is False:
        notes.append(f"{file} has do_center_crop=false, which would stretch images: they are cropped instead")
    if processor.get("resample", BICUBIC) != BICUBIC:
        notes.append(
            f"{file} has resample={processor['resample']!r:.20}, but images are resized with the bicubic filter"
        )
    return tuple(notes)


def _tied(config: Mapping[str, Any], text: Mapping[str, Any], has_head: bool) -> tuple[bool, tuple[str, ...]]:
    """Returns `tie_word_embeddings`, which is in two places. The tensors decide if these differ."""
    values = {field(part, "tie_word_embeddings", bool) for part in (config, text) if "tie_word_embeddings" in part}
    if len(values) == 1:
        return values.pop(), ()
    tied = not has_head
    if not values:
        return tied, ()
    state = "has no lm_head" if tied else "has an lm_head"
    return tied, (
        f"config.json has tie_word_embeddings={config['tie_word_embeddings']} and, in text_config, "
        f"{text['tie_word_embeddings']}, but the checkpoint {state}: the weights decide",
    )


# mlx-vlm


def views_of_mlx(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, View]:
    """Returns the view of each tensor of an mlx-vlm folder, by Apple's name.

    Raises:
        WeightsError: some convolutions are channels-last and others are not, or groups lack their scales, biases or
            description.
        ConfigError: the description is malformed.
    """
    encoder = {name: info.shape for name, info in tensors.items() if name.startswith(MLX_ENCODER_PREFIX)}
    channels_last = is_channels_last(encoder)
    quantization = _quantization(tensors, config)
    apple_names = rename(tensors, "mlx", "apple")
    views: dict[str, View] = {}
    for name, info in tensors.items():
        layer = name.rpartition(".")[0]
        packed = f"{layer}.scales" in tensors
        if packed and name.endswith((".scales", ".biases")):
            continue
        if packed and name.endswith(".weight") and quantization is not None:
            view = _packed_view(name, info, quantization.of(layer))
        elif channels_last and name in encoder and len(info.shape) in (3, 4):
            view = _permuted_view(name, info, to_apple_axes(info.shape))
        else:
            view = View(name, info)
        # Some converters leave the head outside of `language_model`.
        if not is_known(name, "mlx") and not name.startswith("lm_head."):
            raise WeightsError(f"{name!r:.80} is not a tensor of mlx-vlm's FastVLM. Download the checkpoint again.")
        views[apple_names[name]] = view
    return views


def _permuted_view(name: str, info: TensorInfo, permutation: tuple[int, ...]) -> View:
    return View(name, TensorInfo(tuple(info.shape[axis] for axis in permutation), info.dtype), permutation)


def _packed_view(name: str, info: TensorInfo, affine: Affine) -> View:
    """Returns the view of a matrix that is packed into 32-bit words. `info` describes the packed tensor."""
    rows, words = info.shape
    return View(name, TensorInfo((rows, words * 32 // affine.bits), "F32"), affine=affine)


def is_channels_last(shapes: Mapping[str, Shape]) -> bool:
    """Returns True if the encoder's convolutions are channels-last, judged by all depthwise kernels together.

    A kernel (C, 7, 7, 1) is channels-last, a (C, 1, 7, 7) is not. 1x1 kernels and full ones may be either.

    Raises:
        WeightsError: the kernels disagree, or there are none.
    """
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    last = sorted(name for name, shape in kernels.items() if shape[1] == shape[2] > 1 == shape[3])
    first = sorted(name for name, shape in kernels.items() if shape[2] == shape[3] > 1 == shape[1])
    if bool(last) == bool(first):
        found = f"{last[0]} is channels-last, {first[0]} is not" if last else "no depthwise convolution"
        raise WeightsError(f"the vision encoder's convolutions must have one order of axes, got {found}")
    return bool(last)


def config_of_mlx(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Apple's `config.json`. mlx-vlm has the same fields, some in `text_config`. Raises ConfigError."""
    text, vision = (config.get(key) or {} for key in ("text_config", "vision_config"))
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError("config.json: text_config and vision_config must be objects")
    own = {key: value for key, value in config.items() if key not in MLX_FIELDS}
    apple = {**{key: value for key, value in text.items() if value is not None}, **own, "model_type": "llava_qwen2"}
    if "mm_vision_tower" not in apple and isinstance(vision.get("image_size"), int):
        apple["mm_vision_tower"] = f"mobileclip_l_{vision['image_size']}"
    return apple


def _quantization_note(views: Mapping[str, View]) -> tuple[str, ...]:
    bits = {view.affine.bits for view in views.values() if view.affine is not None}
    if not bits:
        return ()
    widths = " and ".join(str(count) for count in sorted(bits))
    return (f"the checkpoint is already quantized to {widths} bits: an export starts from the rounded weights",)


def _quantization(tensors: Tensors, config: Mapping[str, Any]) -> Quantization | None:
    """Returns the description of the quantized layers, checked against the tensors."""
    layers = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not layers:
        return None
    described = config.get("quantization") or config.get("quantization_config")
    if not isinstance(described, Mapping):
        raise WeightsError(
            f"{len(layers)} layers are quantized (they have .scales), but config.json has no 'quantization'"
        )
    quantization = Quantization.from_dict(described)
    for layer in layers:
        _check_groups(tensors, layer, quantization)
    return quantization


def _check_groups(tensors: Tensors, layer: str, quantization: Quantization) -> None:
    parts = [tensors.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
    if any(part is None or len(part.shape) != 2 for part in parts):
        raise WeightsError(f"{layer} must have a packed .weight, .scales and .biases. Download the checkpoint again.")
    packed, scales, biases = (part for part in parts if part is not None)
    affine = quantization.of(layer)
    columns = packed.shape[1] * 32 // affine.bits
    if packed.dtype != "U32" or scales != biases or scales.shape != (packed.shape[0], columns // affine.group_size):
        raise WeightsError(
            f"{layer} must have groups of {affine.group_size} with {affine.bits} bits, as config.json has it, got "
            f"scales of shape {list(scales.shape)}"
        )
