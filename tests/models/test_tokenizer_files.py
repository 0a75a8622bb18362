"""Untrusted tokenizer files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import ConfigError
from fastvlm.models.random_checkpoint import RandomCheckpoint
from fastvlm.models.references import TINY_FOLDER
from fastvlm.models.tokenizer_files import largest_token_id, load_tokenizer

CONTENT = json.loads((TINY_FOLDER / "tokenizer.json").read_text())


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = copy.deepcopy(CONTENT)
    change(content)
    return json.dumps(content).encode()


def regex(pattern: str) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


def test_qwen2_tokenizer_is_loaded() -> None:
    assert load_tokenizer(json.dumps(CONTENT).encode(), "f").get_vocab_size() > 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (regex("(a*)*b"), "regex .* is not Qwen2"),
        (regex("("), "f is not a tokenizer"),
        (lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xx"}), "'Replace'"),
        (
            lambda c: c.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "x"}],
                }
            ),
            "normalizer must be NFC, .*got 'Prepend'",
        ),
        (lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAA="}), "'Precompiled'"),
        (lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "'Metaspace'|not a tokenizer"),
        (lambda c: c["model"].update(dropout=0.5), "drops merges at random"),
        (lambda c: c["model"].update(type="WordLevel", unk_token="a"), "BPE|not a tokenizer"),
        (lambda c: c.update(decoder={"type": "WordPiece", "prefix": "", "cleanup": False}), "byte-level"),
        (lambda c: c["model"].update(merges=[["a", "zzzz"]]), "f is not a tokenizer"),
    ],
)
def test_config_error_when_a_tokenizer_is_not_qwen2s(change: Callable, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(changed(change), "f")


@pytest.mark.parametrize("content", [b"{", b"{}", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_config_error_when_a_tokenizer_is_malformed(content: bytes) -> None:
    with pytest.raises(ConfigError, match="f is not a tokenizer"):
        load_tokenizer(content, "f")


def test_golden_tokenizers_are_loaded(golden: Path) -> None:
    files = sorted(golden.glob("*/tokenizer.json"))
    assert files
    for file in files:
        load_tokenizer(file.read_bytes(), str(file))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7031645\n", "a git-lfs pointer"),
        (b"", "an empty file"),
        (b"Entry not found", "a text, not the file itself"),
    ],
)
def test_other_files_in_place_of_a_tokenizer_are_named(content: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=f"^tokenizer.json is {what}"):
        load_tokenizer(content, "tokenizer.json")


def test_largest_id_counts_vocabulary_and_added_tokens() -> None:
    files = RandomCheckpoint("tiny").tokenizer_files()
    tokenizer = json.loads(files["tokenizer.json"])
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    assert largest_token_id(files) == max(ids)
    assert largest_token_id({}) == -1
