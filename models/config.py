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

MAX_IMAGE_SIZE = 2048
"""The largest side of the encoder's square, in pixels, twice the training size."""
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

        Ignores training-only fields (dropout, initializer), `torch_dtype` (the tensors have it), and
        `max_window_layers` and `sliding_window` (they only apply with `use_sliding_window`, which is refused).

        Raises:
            ConfigError: a field is missing, malformed, contradictory, or asks for a feature that the decoder lacks.
        """
        if field(values, "hidden_act", str, "silu") != "silu":
            raise ConfigError(f"config.json: hidden_act must be 'silu', got {values['hidden_act']!r:.80}")
        if field(values, "use_sliding_window", bool, False):
            raise ConfigError("config.json: use_sliding_window must be false, got true")
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
            max_position_embeddings=field(values, "max_position_embeddings", int, 32768),
            tie_word_embeddings=field(values, "tie_word_embeddings", bool, True),
        )


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
            image_aspect_ratio=field(values, "image_aspect_ratio", str, "pad"),
            eos_token_ids=_eos_token_ids(values, generation or {}),
            image_token_index=image_token_index,
            tokenizer_model_max_length=field(
                values, "tokenizer_model_max_length", int, decoder.max_position_embeddings
            ),
            quantization=_quantization(values),
        )


def check_image_size(image_size: int) -> None:
    """Raises ConfigError unless the encoder can be built for squares of `image_size` pixels."""
    if image_size % PATCH_SIZE or not 2 * PATCH_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(
            f"image_size must be a multiple of {PATCH_SIZE} from {2 * PATCH_SIZE} to {MAX_IMAGE_SIZE}, got {image_size}"
        )


def _image_size(values: Mapping[str, Any]) -> int:
    """Returns the training resolution, which Apple's file only has in `mm_vision_tower` (`mobileclip_l_1024`)."""
    tower = field(values, "mm_vision_tower", str)
    match = re.search(r"_(\d{2,5})$", tower)
    if match is None:
        raise ConfigError(
            f"config.json: mm_vision_tower must end in the image size, as in 'mobileclip_l_1024', got {tower!r:.80}"
        )
    return int(match[1])


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
