"""`<image>` gets into the tokenizer with the id that the clients expect, whatever the files looked like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastvlm.export.tokenizer import add_image_token, export_tokenizer
from fastvlm.models.errors import ConfigError
from fastvlm.models.random_checkpoint import RandomCheckpoint

TEXTS = [
    "Describe the image.",
    "It's 12 o'clock,\n\n\tisn't it?",
    "Größe 中文 🦜🏽",
    "  two  spaces ",
    "<|im_end|>x<|im_start|>",
]


def loaded(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def test_image_token_follows_the_last_added_token() -> None:
    exported = export_tokenizer(RandomCheckpoint("tiny").tokenizer_files())
    tokenizer = loaded(exported.files)
    assert exported.image_token_index == 1023
    assert tokenizer.token_to_id("<image>") == 1023
    assert tokenizer.encode("a<image>b").ids.count(1023) == 1
    config = json.loads(exported.files["tokenizer_config.json"])
    assert config["added_tokens_decoder"]["1023"]["content"] == "<image>"


@pytest.mark.parametrize(("last_added", "expected"), [(151645, 151646), (151664, 151665)])
def test_image_token_is_not_hard_coded(last_added: int, expected: int) -> None:
    tokenizer = {
        "added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(151643, last_added + 1)],
        "model": {"vocab": {"a": 0, "b": 151642}},
    }
    assert add_image_token(tokenizer, {}) == expected


def test_image_token_that_is_there_keeps_its_id() -> None:
    files = dict(export_tokenizer(RandomCheckpoint("tiny").tokenizer_files()).files)
    again = export_tokenizer(files)
    assert again.image_token_index == 1023
    assert again.files["tokenizer.json"] == files["tokenizer.json"]


def test_image_token_does_not_take_a_word_of_the_vocabulary() -> None:
    tokenizer = {"added_tokens": [{"id": 0, "content": "<s>"}], "model": {"vocab": {"a": 1, "b": 2}}}
    assert add_image_token(tokenizer, {}) == 3


def test_tokenizer_from_vocabulary_and_merges_encodes_the_same(golden: Path) -> None:
    folder = golden / "llava_small_reparam_tied"
    fast = (folder / "tokenizer.json").read_bytes()
    model = json.loads(fast)["model"]
    slow = {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]).encode(),
        "tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes(),
    }
    ours = loaded(dict(export_tokenizer(slow).files))
    reference = loaded(dict(export_tokenizer({"tokenizer.json": fast}).files))
    assert ours.get_vocab() == reference.get_vocab()
    for text in TEXTS:
        assert ours.encode(text).ids == reference.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_added_tokens_keep_their_own_flags() -> None:
    source = {
        "vocab.json": b'{"a": 0, "b": 1}',
        "merges.txt": b"a b\n",
        "tokenizer_config.json": json.dumps(
            {
                "added_tokens_decoder": {
                    "2": {"content": "<|im_end|>", "special": True},
                    "3": {"content": "<tool>", "special": False, "lstrip": True},
                }
            }
        ).encode(),
    }
    source["vocab.json"] = b'{"a": 0, "ab": 1, "b": 4}'
    with pytest.raises(ConfigError):
        export_tokenizer(source)  # two tokens would share the room behind the vocabulary
    source["vocab.json"] = b'{"a": 0, "b": 1}'
    source["merges.txt"] = b""
    added = json.loads(export_tokenizer(source).files["tokenizer.json"])["added_tokens"]
    assert [(token["content"], token["special"], token["lstrip"]) for token in added] == [
        ("<|im_end|>", True, False),
        ("<tool>", False, True),
        ("<image>", True, False),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_synthetic_tokenizer_returns_every_text(text: str) -> None:
    tokenizer = loaded(RandomCheckpoint("tiny").tokenizer_files())
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_id_of_the_synthetic_tokenizer_is_taken() -> None:
    checkpoint = RandomCheckpoint("tiny")
    ids = sorted(loaded(export_tokenizer(checkpoint.tokenizer_files()).files).get_vocab().values())
    assert ids == list(range(checkpoint.config.decoder.vocab_size))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer: neither"),
        ({"tokenizer.json": b"{"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer.json": b"[]"}, "must be a JSON object"),
        ({"tokenizer.json": b"{}"}, "'added_tokens' with ids"),
        ({"tokenizer.json": b'{"added_tokens": [{"id": "x"}], "model": {"vocab": {}}}'}, "'added_tokens' with ids"),
        ({"tokenizer.json": b'{"added_tokens": [], "model": {"vocab": {"a": 0}}}'}, "is not a tokenizer"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, "must map tokens to ids"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"\xff"}, "not UTF-8"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b""}, "has no added tokens"),
        (
            {"vocab.json": b'{"a": 0}', "merges.txt": b"", "added_tokens.json": b'{"<x>": "1"}'},
            "must map tokens to ids",
        ),
        (
            {
                "vocab.json": b'{"a": 0}',
                "merges.txt": b"",
                "tokenizer_config.json": b'{"added_tokens_decoder": {"1": 2}}',
            },
            "malformed entry",
        ),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"", "added_tokens.json": b'{"<x>": 7}'}, "ids must have no gaps"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"one\n"}, "two symbols per line"),
    ],
)
def test_damaged_tokenizers_are_one_line(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        export_tokenizer(files)
    assert "\n" not in str(caught.value)


def with_template(template: str | None, **settings: object) -> dict[str, bytes]:
    files = dict(RandomCheckpoint("tiny").tokenizer_files())
    config = json.loads(files["tokenizer_config.json"]) | settings
    config = {key: value for key, value in config.items() if key != "chat_template" or template is not None}
    files["tokenizer_config.json"] = json.dumps(
        config if template is None else {**config, "chat_template": template}
    ).encode()
    return files


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<start_of_turn>user {{ messages[0].content }}<end_of_turn>", "that of Gemma: it writes <start_of_turn>"),
        ("{% unknown %}", "malformed at line 1"),
        ("{{ messages[0].content.nothing() }}", "cannot take a question|calls"),
        ("{{ messages[0].role }}", "leaves out the question"),
    ],
)
def test_template_that_makes_no_prompt_fails_at_export(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_tokenizer(with_template(template))


def test_ends_of_an_answer_are_those_of_template_and_config() -> None:
    exported = export_tokenizer(with_template(None, eos_token="<|endoftext|>"))
    tokens = {token["content"]: token["id"] for token in json.loads(exported.files["tokenizer.json"])["added_tokens"]}
    assert exported.turn_end_id == tokens["<|im_end|>"]
    assert exported.eos_token_id == tokens["<|endoftext|>"]
    assert json.loads(exported.files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"  # for clients


def test_eos_token_that_the_template_writes_is_kept() -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}"
    exported = export_tokenizer(with_template(template, eos_token="<|endoftext|>"))
    assert json.loads(exported.files["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
