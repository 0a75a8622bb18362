"""The tokenizer's files of an exported folder: one `tokenizer.json`, with `<image>` in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.chat_template import (
    TEMPLATE_FILE,
    Render,
    begins_answer,
    check_family,
    check_renders,
    renderer,
    special_token_text,
    template_text,
    turn_end,
)
from ..models.errors import ConfigError
from ..models.files import parse_json_object
from ..models.tokenizer_files import IMAGE_TOKEN, MAX_TOKENIZER_BYTES, added_token, byte_level_bpe, load_tokenizer

KEEP_SPACES = ("clean_up_tokenization_spaces", False)
"""A setting that swift-transformers takes as true if it is absent, which would remove spaces before punctuation."""

COPIED_FILES = ("special_tokens_map.json", TEMPLATE_FILE, "generation_config.json")


@dataclass(frozen=True)
class ExportedTokenizer:
    """The tokenizer of an export."""

    files: Mapping[str, bytes]
    image_token_index: int
    largest_id: int
    """The largest id of a token but `<image>`, which needs no embedding."""
    turn_end_id: int | None
    """The id that the chat template writes after an answer, or None."""
    eos_token_id: int | None
    """The id of `eos_token` in the checkpoint's tokenizer_config.json, or None."""
    begins_answer: bool = True
    """False for a chat template that ends with the question."""


def export_tokenizer(source: Mapping[str, bytes]) -> ExportedTokenizer:
    """Returns the files to write, from the checkpoint's.

    `<image>` keeps its id if the tokenizer has it. Otherwise it gets the id after the last added token: 151646 for the
    0.5B and 1.5B, another one for the 7B. Checkpoints saved with the slow tokenizer have only `vocab.json` and
    `merges.txt`, and get a `tokenizer.json` made from them.

    Raises:
        ConfigError: the tokenizer is missing, its files are malformed, or its chat template cannot make a prompt.
    """
    config = parsed(source, "tokenizer_config.json") if "tokenizer_config.json" in source else {}
    if "tokenizer.json" in source:
        tokenizer = parsed(source, "tokenizer.json")
    elif "vocab.json" in source and "merges.txt" in source:
        tokenizer = tokenizer_from_vocabulary(source, config)
    else:
        raise ConfigError(
            "the checkpoint has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt. Download it again."
        )
    image_token_index = add_image_token(tokenizer, config)
    config.setdefault(*KEEP_SPACES)
    check_loadable(tokenizer)
    files = {name: source[name] for name in COPIED_FILES if name in source}
    files["tokenizer.json"] = json.dumps(tokenizer, ensure_ascii=False, indent=1).encode()
    tokens = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    own = files[TEMPLATE_FILE].decode("utf-8-sig", "replace") if TEMPLATE_FILE in files else None
    template = template_text(own, config)
    render, written_eos = _checked_template(template, config, tokens), special_token_text(config, "eos_token")
    end = turn_end(render, tokens)
    if end is not None and "eos_token" not in (template or ""):  # clients end an answer at this token alone
        config["eos_token"] = next(text for text, token_id in tokens.items() if token_id == end)
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return ExportedTokenizer(
        files,
        image_token_index,
        largest_id=max({*tokenizer["model"]["vocab"].values(), *tokens.values()} - {image_token_index}, default=-1),
        turn_end_id=end,
        eos_token_id=tokens.get(written_eos or ""),
        begins_answer=begins_answer(render),
    )


def _checked_template(template: str | None, config: Mapping[str, Any], tokens: Mapping[str, int]) -> Render:
    """Returns the chat template. Raises ConfigError for one that makes no prompt, or another family's."""
    render = renderer(template, config)
    check_renders(render)
    check_family(render, tokens)
    return render


def add_image_token(tokenizer: dict[str, Any], config: dict[str, Any]) -> int:
    """Adds `<image>` to both descriptions in place, and returns its id. Raises ConfigError if they are malformed."""
    added = tokenizer.setdefault("added_tokens", [])
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    whole = isinstance(added, list) and all(_is_added_token(token) for token in added)
    if not whole or not isinstance(vocab, dict) or not all(is_id(token_id) for token_id in vocab.values()):
        raise ConfigError("tokenizer.json must have 'added_tokens' with ids and a byte-level BPE 'model.vocab'.")
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
    """Returns `tokenizer.json` from the slow tokenizer's files, in the form of transformers' converter for Qwen2.

    Raises:
        ConfigError: the files are malformed, or have no added tokens.
    """
    vocab = parsed(source, "vocab.json")
    try:
        lines = source["merges.txt"].decode("utf-8").splitlines()
    except UnicodeDecodeError as reason:
        raise ConfigError(f"merges.txt is not UTF-8 ({reason}).") from None
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if not all(is_id(token_id) for token_id in vocab.values()) or any(len(pair) != 2 for pair in merges):
        raise ConfigError("vocab.json must map tokens to ids, and merges.txt must have two symbols per line.")
    added = slow_added_tokens(source, config)
    if not added:
        raise ConfigError(
            "the checkpoint has no added tokens, so <|im_start|> and <|im_end|> have no ids. They must be in "
            "added_tokens.json or in added_tokens_decoder of tokenizer_config.json."
        )
    return byte_level_bpe(vocab, merges, [added[token_id] for token_id in sorted(added)])


def slow_added_tokens(source: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the added tokens by id, from `added_tokens.json` and, with flags, from `added_tokens_decoder`."""
    added: dict[int, dict[str, Any]] = {}
    if "added_tokens.json" in source:
        for content, token_id in parsed(source, "added_tokens.json").items():
            if not is_id(token_id):
                raise ConfigError(
                    f"added_tokens.json must map tokens to ids (got {token_id!r:.40} for {content!r:.40})."
                )
            added[token_id] = added_token(token_id, content)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ConfigError("tokenizer_config.json: added_tokens_decoder must map ids to tokens.")
    for key, entry in decoder.items():
        if not key.isdigit() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise ConfigError(f"tokenizer_config.json: added_tokens_decoder has a malformed entry {key!r:.40}.")
        plain = added_token(int(key), entry["content"])
        flags = {name: entry[name] for name in plain.keys() & entry.keys() if isinstance(entry[name], bool)}
        added[int(key)] = {**plain, **flags}
    return added


def check_loadable(tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the `tokenizers` library loads it, with every added token at its id."""
    loaded = load_tokenizer(json.dumps(tokenizer).encode(), "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        found = loaded.token_to_id(token["content"])
        if found != token["id"]:  # the library renumbers ids that leave a gap
            raise ConfigError(
                f"tokenizer.json: {token['content']!r:.40} has the id {token['id']}, but it loads as {found}. The ids "
                "must have no gaps."
            )


def parsed(source: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ConfigError if it is too large or malformed."""
    if len(source[name]) > MAX_TOKENIZER_BYTES:
        raise ConfigError(f"{name} must have at most {MAX_TOKENIZER_BYTES} bytes (got {len(source[name])}).")
    return parse_json_object(source[name], name)


def _is_added_token(token: Any) -> bool:
    return isinstance(token, dict) and is_id(token.get("id")) and isinstance(token.get("content"), str)


def is_id(value: Any) -> bool:
    """Returns True for a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
