"""Names in the Hugging Face native layout (`fast_vlm`): a timm tower, `multi_modal_projector`, `language_model`.

timm numbers stages where Apple's `network` counts every part: blocks, downsamplings and position convolutions. What a
part is stands in the names of its tensors, so the mapping is made for all names of a checkpoint together. Facts from
timm's `fastvit.py` and transformers' `convert_fastvlm_weights_to_hf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .apple_layout import APPLE_ENCODER_PREFIX, renamed

HF_ENCODER_PREFIX = "model.vision_tower.timm_model."

HF_PREFIXES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
"""Apple's prefix -> Hugging Face's, of the language side; the first that fits counts."""

TIMM_WORDS = (
    ("patch_embed", "stem"),
    ("conv_exp", "final_conv"),
    ("convffn", "mlp"),
    ("se.reduce", "se.fc1"),
    ("se.expand", "se.fc2"),
    ("layer_scale", "layer_scale.gamma"),
    ("layer_scale_1", "layer_scale_1.gamma"),
    ("layer_scale_2", "layer_scale_2.gamma"),
    ("proj.0.lkb_reparam", "proj.0.reparam_conv"),
    ("lkb_origin", "large_conv"),
    ("rbr_conv", "conv_kxk"),
    ("rbr_scale", "conv_scale"),
    ("rbr_skip", "identity"),
    ("pe", "pos_enc"),
)
"""Apple's words inside a tensor's name -> timm's, training form included."""


def hf_names(apple_names: Iterable[str]) -> dict[str, str]:
    """Apple's name -> Hugging Face's, for those tensors that it keeps (the unused head is left out)."""
    names = [name for name in apple_names if not name.startswith(f"{APPLE_ENCODER_PREFIX}head.")]
    return _mapped(names, APPLE_ENCODER_PREFIX, HF_ENCODER_PREFIX, _apple_parts(names), TIMM_WORDS, HF_PREFIXES)


def apple_names_of_hf(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's name -> Apple's."""
    names = list(names)
    words = [(timm, apple) for apple, timm in TIMM_WORDS]
    prefixes = [(hf, apple) for apple, hf in HF_PREFIXES]
    return _mapped(names, HF_ENCODER_PREFIX, APPLE_ENCODER_PREFIX, _timm_parts(names), words, prefixes)


def _mapped(
    names: Iterable[str],
    source: str,
    target: str,
    parts: Sequence[tuple[str, str]],
    words: Sequence[tuple[str, str]],
    prefixes: Sequence[tuple[str, str]],
) -> dict[str, str]:
    """`names` by their new ones; those of the encoder begin with `source` and get `target`."""
    found = {}
    for name in names:
        if not name.startswith(source):
            found[name] = renamed(name, prefixes)
            continue
        inner = renamed(name.removeprefix(source), parts)
        for old, new in words:
            inner, count = re.subn(rf"(?<![\w.]){re.escape(old)}\b|(?<=\.){re.escape(old)}\b", new, inner)
            if count and old.startswith("layer_scale"):
                break  # `layer_scale.gamma` holds `layer_scale` again
        found[name] = target + inner
    return found


def _apple_parts(names: Iterable[str]) -> list[tuple[str, str]]:
    """(Apple's prefix, timm's) of each part of the network, in Apple's order."""
    kinds: dict[int, str] = {}
    for name in names:
        if match := re.match(rf"{re.escape(APPLE_ENCODER_PREFIX)}network\.(\d+)\.(\w+)", name):
            kinds[int(match[1])] = {"proj": "downsample", "reparam_conv": "pos_emb", "pe": "pos_emb"}.get(
                match[2], "blocks"
            )
    stage, parts = 0, []
    for index in sorted(kinds):
        stage += kinds[index] == "downsample"
        parts.append((f"network.{index}.", f"stages.{stage}.{kinds[index]}."))
    return parts


def _timm_parts(names: Iterable[str]) -> list[tuple[str, str]]:
    """(timm's prefix, Apple's) of each part of the network, in Apple's order."""
    pattern = re.compile(rf"{re.escape(HF_ENCODER_PREFIX)}stages\.(\d+)\.(downsample|pos_emb|blocks)\.")
    found = {(int(match[1]), match[2]) for name in names if (match := pattern.match(name))}
    order = ("downsample", "pos_emb", "blocks")
    in_order = sorted(found, key=lambda part: (part[0], order.index(part[1])))
    return [(f"stages.{stage}.{kind}.", f"network.{index}.") for index, (stage, kind) in enumerate(in_order)]
