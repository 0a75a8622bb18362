"""The content of a Qwen2 `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What pieces a text is cut into before merging (Qwen2's `tokenizer.json`).
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], added_tokens: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of a `tokenizer.json` for a byte-level BPE that normalizes and cuts text as Qwen2's does."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [" ".join(pair) for pair in merges],  # the form that older readers take too
        },
    }


def added_token(token_id: int, content: str) -> dict[str, Any]:
    """An entry of `added_tokens` in `tokenizer.json`."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
