"""What the tensors of a LoRA adapter are called, and which of the checkpoint's they belong to.

PEFT writes `base_model.model.<module>.lora_A.weight`; LLaVA's trainer adds a file with what it trained in full, under
`base_model.` or `base_model.model.`. Sources: PEFT's checkpoint format guide, LLaVA's `model/builder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .apple_layout import renamed
from .hf_layout import HF_PREFIXES

PARTS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "embedding_A", "lora_embedding_B": "embedding_B"}
WORDS_BEFORE = ("base_model.", "model.", "module.")
"""What wrappers put in front of a module's name, any number of times."""
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.\w+)?|original_module)(?=\.)")
"""What PEFT puts inside the name of a tensor that it holds whole."""
LORA = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB])(\.(?!(weight|bias)$)\w+)?(\.weight)?$")
"""A factor's name, perhaps with the adapter's own (`default`) in it."""


@dataclass(frozen=True)
class Part:
    """What a tensor of an adapter is: a factor of a change, or a whole tensor in place of the checkpoint's."""

    target: str
    """The checkpoint's tensor."""
    kind: str
    """`A`, `B`, `embedding_A`, `embedding_B` or `whole`."""


def part_of(name: str, tensors: Collection[str]) -> Part | None:
    """What `name` is to a checkpoint with `tensors`; None where it belongs to nothing."""
    match = LORA.match(name)
    if match:
        target = _found(f"{match['module']}.weight", tensors)
        return Part(target, PARTS[match["part"]]) if target else None
    target = _found(WRAPPERS.sub("", name), tensors)
    return Part(target, "whole") if target else None


def module_of(target: str) -> str:
    """The module that a tensor belongs to, as `rank_pattern` and `alpha_pattern` name it."""
    return target.rpartition(".")[0]


def _found(name: str, tensors: Collection[str]) -> str | None:
    """`name`, or what is left of it without the wrappers in front, if it is one of `tensors`; in Hugging Face's too."""
    while name not in tensors:
        apple = renamed(name, [(hf, apple) for apple, hf in HF_PREFIXES])
        if apple in tensors:
            return apple
        word = next((word for word in WORDS_BEFORE if name.startswith(word)), None)
        if word is None:
            return None
        name = name.removeprefix(word)
    return name
