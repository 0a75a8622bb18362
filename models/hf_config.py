"""`config.json` of the Hugging Face native layout (`fast_vlm`), as Apple's fields and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from .config import PATCH_SIZE
from .errors import ConfigError
from .json_file import field

TRAINED_IMAGE_SIZE = 1024
"""FastVLM's own, in pixels: what counts where no file says anything."""
LLAVA_IMAGE_TOKENS = 576
"""`image_seq_length` of files that only repeat the default of LLaVA's class, where it means nothing."""
NO_LIMIT = 10**9
"""Tokenizers without a limit name a number beyond this."""

TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings", "max_window_layers",
    "hidden_act", "attention_dropout", "initializer_range", "use_sliding_window", "sliding_window", "use_cache",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Of `text_config`, which Apple has at the top."""


def apple_config(
    config: Mapping[str, Any], tensors: Collection[str], files: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Apple's `config.json`, and notes on what contradicted itself or had to be assumed.

    `tensors` are Apple's names of what the checkpoint holds; `files` the other JSON files of the folder, by name.

    Raises:
        ConfigError: a field is missing, malformed, or asks for what FastVLM does not do.
    """
    text, vision = _object(config, "text_config"), _object(config, "vision_config")
    for key, wanted in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full")):
        if field(config, key, str, wanted) != wanted:
            raise ConfigError(f"config.json: {key} should be {wanted!r}; found {config[key]!r:.40}")
    if field(config, "vision_feature_layer", int, -1) != -1:
        raise ConfigError(
            f"config.json: vision_feature_layer should be -1; found {config['vision_feature_layer']!r:.40}"
        )
    image_size, assumed = _image_size(config, files.get("preprocessor_config.json", {}))
    tied, contradicted = _tied(config, text, "lm_head.weight" in tensors)
    limit = files.get("tokenizer_config.json", {}).get("model_max_length")
    apple = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **{key: text[key] for key in TEXT_FIELDS if text.get(key) is not None},
        "image_aspect_ratio": field(config, "image_aspect_ratio", str, "crop"),  # what its image processor does
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


def hf_config(apple: Mapping[str, Any], depths: tuple[int, ...], embed_dims: tuple[int, ...]) -> dict[str, Any]:
    """`config.json` of the Hugging Face layout. `image_aspect_ratio` stays, as a field that only we read."""
    image_size = int(apple["mm_vision_tower"].rpartition("_")[2])
    tied = apple.get("tie_word_embeddings", True)
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": "fast_vlm",
        "image_aspect_ratio": apple.get("image_aspect_ratio", "pad"),
        "image_seq_length": (image_size // PATCH_SIZE) ** 2,
        **({"image_token_index": apple["image_token_index"]} if "image_token_index" in apple else {}),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "qwen2",
            **{key: apple[key] for key in TEXT_FIELDS if key in apple},
            "tie_word_embeddings": tied,
        },
        "tie_word_embeddings": tied,
        "vision_config": {
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": apple["mm_hidden_size"],
            "model_args": {"embed_dims": list(embed_dims), "inference_mode": True, "layers": list(depths)},
            "model_type": "timm_wrapper",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} should be an object, as fast_vlm has it; found {value!r:.40}")
    return value


def _image_size(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The square that the image processor makes, in pixels; where it is not there, what the token count implies."""
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        edges = list(size.values()) if isinstance(size, Mapping) else [] if size is None else [size]
        whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges)
        if not whole or len(set(edges)) > 1:
            raise ConfigError(f"preprocessor_config.json: {key} should be a square's side; found {size!r:.80}")
        if edges:
            return edges[0], ()
    tokens = field(config, "image_seq_length", int, LLAVA_IMAGE_TOKENS)
    side = math.isqrt(max(tokens, 0))
    if tokens not in (0, LLAVA_IMAGE_TOKENS) and side * side == tokens:
        return side * PATCH_SIZE, ()
    return TRAINED_IMAGE_SIZE, (
        f"the folder has no preprocessor_config.json: images of {TRAINED_IMAGE_SIZE} px are assumed, as FastVLM was "
        "trained; --image-size chooses another",
    )


def _tied(config: Mapping[str, Any], text: Mapping[str, Any], has_head: bool) -> tuple[bool, tuple[str, ...]]:
    """`tie_word_embeddings`, which stands in two places; where they differ, the tensors decide."""
    said = {field(values, "tie_word_embeddings", bool) for values in (config, text) if "tie_word_embeddings" in values}
    if len(said) == 1:
        return said.pop(), ()
    tied = not has_head
    if not said:
        return tied, ()
    state = "has no head" if tied else "has a head"
    return tied, (
        f"config.json says tie_word_embeddings={config['tie_word_embeddings']} and, in text_config, "
        f"{text['tie_word_embeddings']}; the checkpoint {state}: the weights decide",
    )
