"""The tokenizer's files as the exported folder holds them: one `tokenizer.json`, with `<image>` in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.errors import ConfigError
from ..models.files import parse_json_object
from ..models.tokenizer_files import IMAGE_TOKEN, MAX_TOKENIZER_BYTES, added_token, byte_level_bpe, load_tokenizer

KEEP_SPACES = ("clean_up_tokenization_spaces", False)
"""A setting that swift-transformers takes for true where it is absent: spaces in front of punctuation would go."""

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
    config.setdefault(*KEEP_SPACES)
    check_loadable(tokenizer)
    files = {name: source[name] for name in COPIED_FILES if name in source}
    files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False, indent=1).encode()
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return ExportedTokenizer(files, image_token_index)


def add_image_token(tokenizer: dict[str, Any], config: dict[str, Any]) -> int:
    """Adds `<image>` to both descriptions in place and returns its id."""
    added = tokenizer.setdefault("added_tokens", [])
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    whole = isinstance(added, list) and all(_is_added_token(token) for token in added)
    if not whole or not isinstance(vocab, dict) or not all(is_id(token_id) for token_id in vocab.values()):
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
    try:
        lines = source["merges.txt"].decode("utf-8").splitlines()
    except UnicodeDecodeError as reason:
        raise ConfigError(f"merges.txt is not UTF-8: {reason}") from None
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not all(is_id(token_id) for token_id in vocab.values()) or any(len(pair) != 2 for pair in merges):
        raise ConfigError("vocab.json should map tokens to ids, and merges.txt hold two symbols a line")
    added = slow_added_tokens(source, config)
    if not added:
        raise ConfigError(
            "the checkpoint names no added tokens: neither added_tokens.json nor added_tokens_decoder in "
            "tokenizer_config.json is there, so <|im_start|> and <|im_end|> have no ids"
        )
    return byte_level_bpe(vocab, merges, [added[token_id] for token_id in sorted(added)])


def slow_added_tokens(source: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens by id, from `added_tokens.json` and, with their own flags, from `added_tokens_decoder`."""
    added: dict[int, dict[str, Any]] = {}
    if "added_tokens.json" in source:
        for content, token_id in parsed(source, "added_tokens.json").items():
            if not is_id(token_id):
                raise ConfigError(f"added_tokens.json should map tokens to ids; {content!r:.40} has {token_id!r:.40}")
            added[token_id] = added_token(token_id, content)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ConfigError("tokenizer_config.json: added_tokens_decoder should map ids to tokens")
    for key, entry in decoder.items():
        if not key.isdigit() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise ConfigError(f"tokenizer_config.json: added_tokens_decoder has a malformed entry {key!r:.40}")
        plain = added_token(int(key), entry["content"])
        flags = {name: entry[name] for name in plain.keys() & entry.keys() if isinstance(entry[name], bool)}
        added[int(key)] = {**plain, **flags}
    return added


def check_loadable(tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the `tokenizers` library takes it, with every added token at its id."""
    loaded = load_tokenizer(json.dumps(tokenizer).encode(), "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        found = loaded.token_to_id(token["content"])
        if found != token["id"]:  # the library renumbers ids that leave a gap
            raise ConfigError(
                f"tokenizer.json gives {token['content']!r:.40} the id {token['id']}, but it loads as {found}: "
                "its ids should have no gaps"
            )


def parsed(source: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if len(source[name]) > MAX_TOKENIZER_BYTES:
        raise ConfigError(f"{name} has {len(source[name])} bytes; {MAX_TOKENIZER_BYTES} are the most")
    return parse_json_object(source[name], name)


def _is_added_token(token: Any) -> bool:
    return isinstance(token, dict) and is_id(token.get("id")) and isinstance(token.get("content"), str)


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
