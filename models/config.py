"""The content of `config.json`: the Qwen2 decoder, the projector, the image size and the special tokens.

The vision encoder is not described there (Apple's file only has `mobileclip_l_1024`). `fastvit_config.py` derives it
from the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError
from .files import field
from .quantization import Quantization

PATCH_SIZE = 64
"""The pixels per image token along each side. The encoder halves the resolution six times."""

TRAINED_IMAGE_SIZE = 1024
"""The side of FastVLM's training images, in pixels. It applies if no file has another."""

MAX_IMAGE_SIZE = 2048
"""The largest side of the encoder's square, in pixels, twice the training size."""
TILES = ("anyres", "highres")
"""The beginnings of LLaVA's values of `image_aspect_ratio` that cut an image into several."""

MAX_DIMENSION = 2**20
"""The largest width or vocabulary. No real one comes near, so a larger one means a corrupt or hostile file."""
MAX_LAYERS = 1000
"""The largest depth, for the same reason."""


@dataclass(frozen=True)
class Qwen2Config:
    """The Qwen2 decoder, in Hugging Face's field names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "vocab_size", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_DIMENSION
            if not 0 < value <= most:
                raise ConfigError(f"config.json: {name} must be between 1 and {most}, got {value!r:.40}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"config.json: {name} must be a positive number, got {value}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"config.json: hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} "
                "attention heads of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2Config:
        """Reads the decoder's fields of `config.json`.

        Ignores training-only fields (dropout, initializer) and `torch_dtype` (the tensors have it). With a sliding
        window the context is limited to the window, where full attention computes the same.

        Raises:
            ConfigError: a field is missing, malformed, contradictory, or asks for a feature that the decoder lacks.
        """
        if field(values, "hidden_act", str, "silu") != "silu":
            raise ConfigError(f"config.json: hidden_act must be 'silu', got {values['hidden_act']!r:.80}")
        heads = field(values, "num_attention_heads", int)
        return cls(
            hidden_size=field(values, "hidden_size", int),
            intermediate_size=field(values, "intermediate_size", int),
            num_hidden_layers=field(values, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=field(values, "num_key_value_heads", int, heads),
            vocab_size=field(values, "vocab_size", int),
            rms_norm_eps=field(values, "rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(values),
            max_position_embeddings=min(field(values, "max_position_embeddings", int, 32768), *_windows(values)),
            tie_word_embeddings=field(values, "tie_word_embeddings", bool, True),
        )


def _windows(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the sliding window, in tokens, if a layer has one. Qwen2's begins at layer `max_window_layers`."""
    if not field(values, "use_sliding_window", bool, False) or values.get("sliding_window") is None:
        return (MAX_DIMENSION,)
    layers = field(values, "num_hidden_layers", int)
    if field(values, "max_window_layers", int, 0) >= layers:
        return (MAX_DIMENSION,)
    return (field(values, "sliding_window", int),)


def _rope_theta(values: Mapping[str, Any]) -> float:
    """Returns `rope_theta`, which newer files have under `rope_parameters`. Scaled RoPE is refused."""
    for key in ("rope_scaling", "rope_parameters"):
        nested = values.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise ConfigError(f"config.json: {key} must be an object or null, got {nested!r:.80}")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: {key} must have the default rope_type, got {kind!r:.40}")
        if "rope_theta" in nested:
            return field(nested, "rope_theta", float)
    return field(values, "rope_theta", float, 1e6)


@dataclass(frozen=True)
class FastVLMConfig:
    """A whole FastVLM, as `config.json` (Apple's LLaVA fields) describes it."""

    decoder: Qwen2Config
    mm_hidden_size: int
    """The channels of `image_features`, 3072 for FastViTHD."""
    image_size: int
    """The side of the encoder's square input, in pixels."""
    image_aspect_ratio: str
    """The way to make an image square, `pad` or `crop`."""
    eos_token_ids: tuple[int, ...]
    image_token_index: int | None
    """The id of `<image>`, or None for a source checkpoint, which uses the sentinel -200."""
    tokenizer_model_max_length: int
    quantization: Quantization | None = None
    """The quantization of an exported decoder, or None for floating point."""

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        if self.tokenizer_model_max_length < 1:
            raise ConfigError(
                f"config.json: tokenizer_model_max_length must be positive, got {self.tokenizer_model_max_length}"
            )
        if self.image_aspect_ratio not in ("pad", "crop"):
            raise ConfigError(
                f"config.json: image_aspect_ratio must be 'pad' or 'crop', got {self.image_aspect_ratio!r:.80}"
            )

    @property
    def tokens_per_image(self) -> int:
        """The number of positions that an image takes in the decoder."""
        return (self.image_size // PATCH_SIZE) ** 2

    @property
    def max_context(self) -> int:
        """The number of tokens that prompt and answer may fill together."""
        return min(self.decoder.max_position_embeddings, self.tokenizer_model_max_length)

    def with_tied_embeddings(self, tied: bool) -> FastVLMConfig:
        """Returns a copy with `tie_word_embeddings` set to `tied`."""
        return replace(self, decoder=replace(self.decoder, tie_word_embeddings=tied))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> FastVLMConfig:
        """Reads Apple's `config.json`, and the eos ids of `generation_config.json`.

        Raises:
            ConfigError: a field is missing, malformed or contradictory.
        """
        decoder = Qwen2Config.from_dict(values)
        projector = field(values, "mm_projector_type", str, "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            raise ConfigError(f"config.json: mm_projector_type must be 'mlp2x_gelu', got {projector!r:.80}")
        mm_hidden_size = field(values, "mm_hidden_size", int)
        if not 0 < mm_hidden_size <= MAX_DIMENSION:
            raise ConfigError(
                f"config.json: mm_hidden_size must be between 1 and {MAX_DIMENSION}, got {mm_hidden_size}"
            )
        image_token_index = values.get("image_token_index")
        if image_token_index is not None:
            image_token_index = field(values, "image_token_index", int)
        return cls(
            decoder=decoder,
            mm_hidden_size=mm_hidden_size,
            image_size=_image_size(values),
            image_aspect_ratio=_aspect_ratio(values),
            eos_token_ids=_eos_token_ids(values, generation or {}),
            image_token_index=image_token_index,
            tokenizer_model_max_length=field(
                values, "tokenizer_model_max_length", int, decoder.max_position_embeddings
            ),
            quantization=_quantization(values),
        )


def _aspect_ratio(values: Mapping[str, Any]) -> str:
    """Returns `pad` or `crop` for LLaVA's `image_aspect_ratio`.

    LLaVA leaves `square` images to the image processor, which resizes the shorter side and crops.
    """
    written = field(values, "image_aspect_ratio", str, "pad")
    if written.startswith(TILES):
        raise ConfigError(
            f"config.json: image_aspect_ratio must be 'pad', 'square' or 'crop', got {written!r:.80}, which cuts "
            "images into tiles. FastVLM takes one square per image. Set it to 'pad' to answer without tiles."
        )
    return {"square": "crop"}.get(written, written)


def check_image_size(image_size: int) -> None:
    """Raises ConfigError unless the encoder can be built for squares of `image_size` pixels."""
    if image_size % PATCH_SIZE or not 2 * PATCH_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(
            f"image_size must be a multiple of {PATCH_SIZE} from {2 * PATCH_SIZE} to {MAX_IMAGE_SIZE}, got {image_size}"
        )


def config_notes(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns notes on what Apple's `config.json` lacks, and what is assumed instead."""
    notes = []
    if _written_image_size(values) is None:
        notes.append(
            f"config.json: mm_vision_tower {values.get('mm_vision_tower')!r:.80} does not have the image size: "
            f"{TRAINED_IMAGE_SIZE} px are assumed, FastVLM's training size (image_size sets another)"
        )
    (window,) = _windows(values)
    if window < field(values, "max_position_embeddings", int, 32768):
        notes.append(f"config.json has a sliding window: prompt and answer are limited to its {window:,} tokens")
    return tuple(notes)


def _image_size(values: Mapping[str, Any]) -> int:
    """Returns the training resolution, which Apple's file only has in `mm_vision_tower` (`mobileclip_l_1024`)."""
    return _written_image_size(values) or TRAINED_IMAGE_SIZE


def _written_image_size(values: Mapping[str, Any]) -> int | None:
    """Returns the size in the tower's name, perhaps a path, or None. Other towers' names have other numbers."""
    name = field(values, "mm_vision_tower", str, "").rstrip("/").rpartition("/")[2]
    if match := re.search(r"mobileclip_l_(\d{2,5})(?!\d)", name):
        return int(match[1])
    match = re.search(r"_(\d{2,5})$", name)
    size = int(match[1]) if match else 0
    return size if size and size % PATCH_SIZE == 0 and size <= MAX_IMAGE_SIZE else None


def _eos_token_ids(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns every id that ends an answer. Either file may have one id or a list."""
    found: dict[int, None] = {}  # a dict keeps the order
    for source in (values, generation):
        ids = source.get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise ConfigError(f"eos_token_id must be an id or a list of ids, got {ids!r:.80}")
            found[token_id] = None
    return tuple(found)


def _quantization(values: Mapping[str, Any]) -> Quantization | None:
    quantization = values.get("quantization")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"config.json: quantization must be an object, got {quantization!r:.80}")
    return Quantization.from_dict(quantization)
