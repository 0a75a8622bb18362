"""The content of a Qwen2 `tokenizer.json`, and the chat template that comes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError
from .json_file import parse_json_object

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""FastVLM's training prompt (`qwen_2`), whose messages have a text for content."""

CONTENT_LIST = re.compile(r"selectattr\(\s*['\"]type['\"]|\[\s*['\"]type['\"]\s*\]|\.type\b")
"""What templates do that only take content in parts (`[{"type": "image"}, {"type": "text", "text": ...}]`)."""

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


def image_token_id(tokenizer: Mapping[str, Any]) -> int | None:
    """The id of `<image>` in a `tokenizer.json`, or None where it has none."""
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and token.get("content") == "<image>" and isinstance(token.get("id"), int):
            return token["id"]
    return None


def with_plain_template(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Tokenizer files whose chat template takes texts.

    Hugging Face's FastVLM template goes through the parts of a message's content and writes nothing for a text. It is
    replaced by the training prompt, which is what it writes for one image and a text.

    Raises:
        ConfigError: `tokenizer_config.json` is malformed.
    """
    files = dict(files)
    if _takes_only_parts(files.get("chat_template.jinja", b"").decode("utf-8", "replace")):
        files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    content = files.get("tokenizer_config.json")
    if content is not None and b"chat_template" in content:
        settings = parse_json_object(content, "tokenizer_config.json", ConfigError)
        template = settings.get("chat_template")
        if isinstance(template, str) and _takes_only_parts(template):
            settings["chat_template"] = CHAT_TEMPLATE
            files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    return files


def _takes_only_parts(template: str) -> bool:
    return bool(CONTENT_LIST.search(template)) and "is string" not in template
