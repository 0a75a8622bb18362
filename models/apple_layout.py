"""Names and shapes of the language side in Apple's LLaVA layout, and what the exported folder calls them."""

from __future__ import annotations

from collections.abc import Iterable

from .config import FastVLMConfig

Shape = tuple[int, ...]

APPLE_ENCODER_PREFIX = "model.vision_tower.vision_tower.model."

SAVED_PREFIXES = (
    ("model.mm_projector.", "multi_modal_projector.linear_"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Apple's prefix -> the exported folder's; the first that fits counts."""


def saved_name(apple_name: str) -> str:
    """What the exported folder calls a decoder or projector tensor of Apple's layout."""
    name = renamed(apple_name, SAVED_PREFIXES)
    if name == apple_name:
        raise KeyError(apple_name)
    return name


def renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """`name` with the first prefix that it begins with replaced; a name with none of them as it is."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def language_shapes(config: FastVLMConfig, embedding_rows: int | None = None) -> dict[str, Shape]:
    """Every tensor of decoder and projector, by Apple's name, in the order of the computation.

    `embedding_rows` is the height of the embedding table where it differs from `vocab_size` (Qwen2 pads it).
    """
    decoder = config.decoder
    hidden, kv = decoder.hidden_size, decoder.num_key_value_heads * decoder.head_dim
    rows = embedding_rows or decoder.vocab_size
    names: dict[str, Shape] = {
        "model.mm_projector.0.weight": (hidden, config.mm_hidden_size),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
        "model.embed_tokens.weight": (rows, hidden),
    }
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (decoder.intermediate_size, hidden),
        "mlp.up_proj.weight": (decoder.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, decoder.intermediate_size),
    }
    for i in range(decoder.num_hidden_layers):
        names.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    names["model.norm.weight"] = (hidden,)
    if not decoder.tie_word_embeddings:
        names["lm_head.weight"] = (rows, hidden)
    return names
