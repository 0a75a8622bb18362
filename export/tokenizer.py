"""The tokenizer's files as the exported folder holds them: one `tokenizer.json`, with `<image>` in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.errors import ConfigError
from ..models.tokenizer_json import added_token, byte_level_bpe

IMAGE_TOKEN = "<image>"
COPIED_FILES = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class ExportedTokenizer:
    files: Mapping[str, bytes]
    image_token_index: int


def export_tokenizer(source: Mapping[str, bytes]) -> ExportedTokenizer:
    """The files to write, from the checkpoint's.

    `<image>` keeps its id where the tokenizer has it, else it gets the one behind the last added token: 151646 for the
    0.5B and 1.5B, another for the 7B. Checkpoints saved with the slow tokenizer only have `vocab.json` and
    `merges.txt`: they get a `tokenizer.json` made from these.

    Raises:
        ConfigError: there is no tokenizer, or its files are malformed.
    """
    config = parsed(source, "tokenizer_config.json") if "tokenizer_config.json" in source else {}
    if "tokenizer.json" in source:
        tokenizer = parsed(source, "tokenizer.json")
    elif "vocab.json" in source and "merges.txt" in source:
        tokenizer = tokenizer_from_vocabulary(source, config)
    else:
        raise ConfigError("the checkpoint has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    image_token_index = add_image_token(tokenizer, config)
    check_loadable(tokenizer)
    files = {name: source[name] for name in COPIED_FILES if name in source}
    files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False, indent=1).encode()
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return ExportedTokenizer(files, image_token_index)


def add_image_token(tokenizer: dict[str, Any], config: dict[str, Any]) -> int:
    """Adds `<image>` to both descriptions in place and returns its id."""
    added = tokenizer.setdefault("added_tokens", [])
    vocab = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer.get("model"), dict) else None
    if not isinstance(added, list) or not isinstance(vocab, dict) or not all(_is_added_token(t) for t in added):
        raise ConfigError("tokenizer.json should have 'added_tokens' with ids and a byte-level BPE 'model.vocab'")
    for token in added:
        if token["content"] == IMAGE_TOKEN:
            return token["id"]
    taken = set(vocab.values()) | {token["id"] for token in added}
    token_id = 1 + max((token["id"] for token in added), default=max(vocab.values(), default=-1))
    if token_id in taken:
        token_id = 1 + max(taken)
    added.append(added_token(token_id, IMAGE_TOKEN))
    decoder = config.setdefault("added_tokens_decoder", {})
    if isinstance(decoder, dict):
        decoder[str(token_id)] = {
            key: value for key, value in added_token(token_id, IMAGE_TOKEN).items() if key != "id"
        }
    return token_id


def tokenizer_from_vocabulary(source: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` from the slow tokenizer's files, as transformers' converter for Qwen2 lays it out."""
    vocab = parsed(source, "vocab.json")
    lines = source["merges.txt"].decode("utf-8", errors="strict").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not all(isinstance(token_id, int) for token_id in vocab.values()) or any(len(pair) != 2 for pair in merges):
        raise ConfigError("vocab.json should map tokens to ids, and merges.txt hold two symbols a line")
    contents: dict[int, str] = {}
    if "added_tokens.json" in source:
        contents = {token_id: content for content, token_id in parsed(source, "added_tokens.json").items()}
    for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
        contents[int(token_id)] = entry["content"]
    special = [added_token(token_id, contents[token_id]) for token_id in sorted(contents)]
    return byte_level_bpe(vocab, merges, special)


def check_loadable(tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the `tokenizers` library takes it and gives `<image>` as one token."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(json.dumps(tokenizer))
    except Exception as reason:  # the library raises bare Exception
        raise ConfigError(f"tokenizer.json cannot be loaded: {str(reason).splitlines()[0]}") from None
    if loaded.encode(IMAGE_TOKEN, add_special_tokens=False).tokens != [IMAGE_TOKEN]:
        raise ConfigError(f"tokenizer.json does not keep {IMAGE_TOKEN} as one token")


def parsed(source: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(source[name])
    except (ValueError, RecursionError) as reason:
        raise ConfigError(f"{name} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} should hold a JSON object; found {type(value).__name__}")
    return value


def _is_added_token(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("id"), int) and isinstance(token.get("content"), str)
