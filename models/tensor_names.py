"""The names and shapes of tensors in every layout: Apple's LLaVA, Hugging Face's `fast_vlm` with a timm encoder,
mlx-vlm's, an exported folder's and the training network's.

Everything inside fastvlm uses Apple's names. The others are converted where a file is read or written. Sources: Apple's
ml-fastvlm, timm's `fastvit.py`, transformers' `convert_fastvlm_weights_to_hf.py`, and `mlx_vlm/models/fastvlm` of
https://github.com/Blaizzy/mlx-vlm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from .config import FastVLMConfig
from .safetensors_files import Shape

Layout = Literal["apple", "hf", "mlx", "saved", "tiny"]
"""`saved` is an exported folder, `tiny` the modules of the training network."""

PREFIXES: tuple[dict[Layout, str], ...] = (
    {"apple": "model.vision_tower.vision_tower.model", "hf": "model.vision_tower.timm_model",
     "mlx": "vision_tower.vision_model", "tiny": "vision_tower"},
    {"apple": "model.mm_projector.0", "hf": "model.multi_modal_projector.linear_1",
     "mlx": "mm_projector.0", "tiny": "mm_projector.0", "saved": "multi_modal_projector.linear_0"},
    {"apple": "model.mm_projector.2", "hf": "model.multi_modal_projector.linear_2",
     "mlx": "mm_projector.2", "tiny": "mm_projector.2", "saved": "multi_modal_projector.linear_2"},
    {"apple": "model", "hf": "model.language_model",
     "mlx": "language_model.model", "tiny": "decoder", "saved": "language_model.model"},
    {"apple": "lm_head", "hf": "lm_head",
     "mlx": "language_model.lm_head", "saved": "language_model.lm_head"},
)  # fmt: skip
"""The prefix of encoder, projector, decoder and head in each layout. The first match counts. An exported folder has its
encoder as a Core ML package, or under mlx-vlm's names. The training network ties its head to the embeddings."""

ENCODER_WORDS: tuple[tuple[str, str, str], ...] = (
    # Apple                 Hugging Face, timm     mlx-vlm
    ("patch_embed",         "stem",                "patch_embed.blocks"),
    ("conv_exp",            "final_conv",          "conv_exp"),
    ("convffn",             "mlp",                 "convffn"),
    ("se.reduce",           "se.fc1",              "se.reduce"),
    ("se.expand",           "se.fc2",              "se.expand"),
    ("layer_scale",         "layer_scale.gamma",   "layer_scale"),
    ("layer_scale_1",       "layer_scale_1.gamma", "layer_scale_1"),
    ("layer_scale_2",       "layer_scale_2.gamma", "layer_scale_2"),
    ("proj.0.lkb_reparam",  "proj.0.reparam_conv", "proj.0.lkb_reparam"),
    ("lkb_origin",          "large_conv",          "lkb_origin"),
    ("rbr_conv",            "conv_kxk",            "rbr_conv"),
    ("rbr_scale",           "conv_scale",          "rbr_scale"),
    ("rbr_skip",            "identity",            "rbr_skip"),
    ("pe",                  "pos_enc",             "pe"),
)  # fmt: skip
"""The words inside an encoder tensor's name, training form included. The exported folder and the training network use
mlx-vlm's and Apple's."""

TIMM_STAGE_PARTS = ("downsample", "pos_emb", "blocks")
"""The parts of a timm stage, in order of execution. Apple's `network` numbers each of them."""

APPLE_ENCODER_PREFIX = f"{PREFIXES[0]['apple']}."
HF_ENCODER_PREFIX = f"{PREFIXES[0]['hf']}."
MLX_ENCODER_PREFIX = f"{PREFIXES[0]['mlx']}."

WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
    "base_model.",
    "model.",
    "llava.",
    "vlm.",
)
"""The prefixes that training wrappers (DDP, torch.compile, FSDP, PEFT, a parent module) put before every name."""
INNER_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|base_model\.model)\."
)
"""The words that such wrappers put inside a name."""

OLDER_NAMES: tuple[tuple[str, str, str], ...] = (
    # a name that occurs with them      older                             today's
    ("vision_tower.timm_model.",        "vision_tower.",                  "model.vision_tower."),
    ("vision_tower.timm_model.",        "multi_modal_projector.",         "model.multi_modal_projector."),
    ("vision_tower.timm_model.",        "language_model.model.",          "model.language_model."),
    ("vision_tower.timm_model.",        "language_model.lm_head.",        "lm_head."),
    ("vision_tower.vision_model.",      "language_model.model.model.",    "language_model.model."),
    ("vision_tower.vision_model.",      "multi_modal_projector.linear_1", "mm_projector.0"),
    ("vision_tower.vision_model.",      "multi_modal_projector.linear_2", "mm_projector.2"),
    ("vision_tower.vision_model.",      "mm_projector.layers.",           "mm_projector."),
)  # fmt: skip
"""The beginnings of names that older versions of transformers (before 4.52) and of mlx-vlm wrote, with today's. They
apply if a name in the checkpoint begins with the first."""

UNUSED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)image_newline$|position_ids$")
"""The tensors that no computation of FastVLM reads: buffers that old versions of transformers saved, and the row of
LLaVA's tiles, which are not used with one square per image."""
UNMERGED_FACTOR = re.compile(r"\.lora_[AB]\.")
"""The sign of a LoRA whose factors were saved together with the checkpoint."""

UNUSED_ENCODER_TENSORS = ("head.",)
"""The prefixes of encoder tensors that FastVLM does not use."""
HEAD_PROJECTION = "head.proj"
"""The projection of CLIP's head, (channels, projection_dim). FastVLM does not use it, but clients require it."""
PROJECTION_DIM = 768
"""The width of that projection in Apple's checkpoints."""


def rename(names: Iterable[str], source: Layout, target: Layout) -> dict[str, str]:
    """Returns the name in `target` for each of `names`, which are in `source`. Unknown names stay unchanged.

    timm numbers stages where Apple numbers every part, so pass all names of a checkpoint together.
    """
    names = list(names)
    parts = _stage_parts(names, source, target)
    return {name: _renamed(name, source, target, parts) for name in names}


def renamed(name: str, source: Layout, target: Layout) -> str:
    """Returns one name in `target`. An unknown name stays unchanged. Encoder names in `hf` need `rename`."""
    return _renamed(name, source, target, ())


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Returns each name of a checkpoint without the prefixes of training wrappers, if all have them.

    The names stay as they are if no prefix makes them those of a FastVLM, or if two names would be the same.
    """
    plain = _renewed({name: INNER_WRAPPERS.sub("", name) for name in names})
    known = tuple(f"{prefix}." for prefix in PREFIXES[0].values() if prefix != PREFIXES[0]["tiny"])
    while plain and not any(name.startswith(known) for name in plain.values()):
        prefix = next((one for one in WRAPPERS if all(name.startswith(one) for name in plain.values())), None)
        if prefix is None:
            return {name: name for name in plain}
        plain = _renewed({name: short.removeprefix(prefix) for name, short in plain.items()})
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def _renewed(plain: Mapping[str, str]) -> dict[str, str]:
    """Returns today's name for each name that an older version wrote."""
    rows = [row for row in OLDER_NAMES if any(short.startswith(row[0]) for short in plain.values())]
    renewed = {}
    for name, short in plain.items():
        row = next((row for row in rows if short.startswith(row[1])), None)
        renewed[name] = short if row is None else row[2] + short.removeprefix(row[1])
    return renewed


def saved_name(apple_name: str) -> str:
    """Returns the exported folder's name of a decoder or projector tensor. Raises KeyError for any other."""
    name = renamed(apple_name, "apple", "saved")
    if name == apple_name:
        raise KeyError(apple_name)
    return name


def is_known(name: str, layout: Layout) -> bool:
    """Returns True if `name` begins like a part of the model in `layout`."""
    return any(_has_prefix(name, row[layout]) for row in PREFIXES if layout in row)


def language_shapes(config: FastVLMConfig, embedding_rows: int | None = None) -> dict[str, Shape]:
    """Returns the shape of every decoder and projector tensor by Apple's name, in the order of the computation.

    `embedding_rows` is the height of the embedding table if it differs from `vocab_size` (Qwen2 pads it).
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


def to_mlx_axes(shape: Shape) -> tuple[int, ...]:
    """Returns the permutation that turns an encoder tensor of Apple's layout into mlx-vlm's."""
    if len(shape) == 4:
        return 0, 2, 3, 1  # (out, in, K, K) -> (out, K, K, in)
    return (1, 2, 0) if len(shape) == 3 else tuple(range(len(shape)))  # a layer scale (C, 1, 1) -> (1, 1, C)


def to_apple_axes(shape: Shape) -> tuple[int, ...]:
    """Returns the permutation that turns an encoder tensor of mlx-vlm's layout into Apple's."""
    if len(shape) == 4:
        return 0, 3, 1, 2  # (out, K, K, in) -> (out, in, K, K)
    return (2, 0, 1) if len(shape) == 3 else tuple(range(len(shape)))  # (1, 1, C) -> (C, 1, 1)


def apple_encoder_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shape of each of mlx-vlm's encoder tensors in Apple's layout. Names have no prefix on either side."""
    names = rename((MLX_ENCODER_PREFIX + name for name in shapes), "mlx", "apple")
    return {
        names[MLX_ENCODER_PREFIX + name].removeprefix(APPLE_ENCODER_PREFIX): tuple(
            shape[axis] for axis in to_apple_axes(shape)
        )
        for name, shape in shapes.items()
    }


def _renamed(name: str, source: Layout, target: Layout, parts: Sequence[tuple[str, str]]) -> str:
    for row in PREFIXES:
        if source not in row or not _has_prefix(name, row[source]):
            continue
        if target not in row:
            return name
        inner = name.removeprefix(row[source])
        if row is PREFIXES[0]:
            inner = _encoder_words(inner, source, target, parts)
        return row[target] + inner
    return name


def _has_prefix(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _encoder_words(inner: str, source: Layout, target: Layout, parts: Sequence[tuple[str, str]]) -> str:
    """Returns the part of an encoder tensor's name behind the prefix, a leading dot included, in `target`."""
    inner = next((after + inner.removeprefix(before) for before, after in parts if inner.startswith(before)), inner)
    for row in ENCODER_WORDS:
        old, new = _word(row, source), _word(row, target)
        if old == new:
            continue
        inner, count = re.subn(rf"(?<=\.){re.escape(old)}(?=\.|$)", new, inner)
        if count and row[0].startswith("layer_scale"):
            break  # `layer_scale.gamma` contains `layer_scale` again
    return inner


def _word(row: tuple[str, str, str], layout: Layout) -> str:
    return {"apple": row[0], "tiny": row[0], "hf": row[1], "mlx": row[2], "saved": row[2]}[layout]


def _stage_parts(names: Iterable[str], source: Layout, target: Layout) -> list[tuple[str, str]]:
    """Returns (prefix in `source`, prefix in `target`) of each part of the encoder's `network`, in order."""
    if "hf" not in (source, target) or source == target:
        return []
    if source == "hf":
        return [(timm, apple) for timm, apple in _parts_of_timm(names)]
    return _parts_of_apple(rename(names, source, "apple").values())


def _parts_of_apple(names: Iterable[str]) -> list[tuple[str, str]]:
    kinds: dict[int, str] = {}
    for name in names:
        if match := re.match(rf"{re.escape(APPLE_ENCODER_PREFIX)}network\.(\d+)\.(\w+)", name):
            kinds[int(match[1])] = {"proj": "downsample", "reparam_conv": "pos_emb", "pe": "pos_emb"}.get(
                match[2], "blocks"
            )
    stage, parts = 0, []
    for index in sorted(kinds):
        stage += kinds[index] == "downsample"
        parts.append((f".network.{index}.", f".stages.{stage}.{kinds[index]}."))
    return parts


def _parts_of_timm(names: Iterable[str]) -> list[tuple[str, str]]:
    pattern = re.compile(rf"{re.escape(HF_ENCODER_PREFIX)}stages\.(\d+)\.({'|'.join(TIMM_STAGE_PARTS)})\.")
    found = {(int(match[1]), match[2]) for name in names if (match := pattern.match(name))}
    in_order = sorted(found, key=lambda part: (part[0], TIMM_STAGE_PARTS.index(part[1])))
    return [(f".stages.{stage}.{kind}.", f".network.{index}.") for index, (stage, kind) in enumerate(in_order)]
