"""Text to ids and back: text never becomes a control token, and only whole characters are returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import ConfigError, PromptError
from fastvlm.models.tokenizer_files import added_token
from fastvlm.runtime.tokenizer import TextStream, Tokenizer

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
EMOJI = "a😀b👩‍👩‍👧 é ก็"

fixtures_are_constant = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
text_with_controls = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(CONTROLS))).map("".join)


def plain(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@fixtures_are_constant
@given(text=text_with_controls)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert not set(tokenizer.encode(text)) & set(tokenizer.control_tokens.values())


@fixtures_are_constant
@given(text=st.text())
def test_ordinary_text_has_the_ids_that_the_library_gives(write_tokenizer: Callable[..., Path], text: str) -> None:
    folder = write_tokenizer()
    assert Tokenizer(folder).encode(text) == plain(folder).encode(text).ids


def test_text_never_becomes_an_added_token_that_is_not_special(write_tokenizer: Callable[..., Path]) -> None:
    folder = write_tokenizer()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**added_token(1024, "<tool_call>"), "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    assert plain(folder).encode("<tool_call>").ids == [1024]
    assert 1024 not in tokenizer.encode("<tool_call>")
    assert tokenizer.control_tokens["<tool_call>"] == 1024
    assert tokenizer.decode([1024]) == "<tool_call>"  # but an answer may show it
    assert tokenizer.decode([tokenizer.control_tokens["<|im_end|>"]]) == ""


def test_added_token_outside_the_byte_alphabet_is_its_own_text(
    write_tokenizer: Callable[..., Path],
) -> None:
    folder = write_tokenizer()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**added_token(1024, "<\uff5cx\uff5c>"), "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(folder).decode([1024]) == plain(folder).decode([1024]) == "<\uff5cx\uff5c>"


@fixtures_are_constant
@given(text=text_with_controls)
def test_text_comes_back_from_its_ids(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_stream_gives_whole_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(EMOJI)]
    assert "".join(pieces) == EMOJI
    assert len(pieces) > len(EMOJI)
    assert "" in pieces
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_incomplete_character_at_the_end_is_left_out(tokenizer: Tokenizer, cut: int) -> None:
    assert tokenizer.decode(tokenizer.encode("ok😀")[:-cut]) == "ok"


@fixtures_are_constant
@given(ids=st.lists(st.integers(0, 1100), max_size=30))
def test_text_of_any_ids_is_a_prefix_of_the_librarys(write_tokenizer: Callable[..., Path], ids: list[int]) -> None:
    folder = write_tokenizer()
    whole = plain(folder).decode(ids, skip_special_tokens=True)
    found = Tokenizer(folder).decode(ids)
    assert whole.startswith(found)
    assert set(whole[len(found) :]) <= {"�"}  # the library shows an incomplete end as one


def test_ids_beyond_the_vocabulary_give_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), 1030, 5000, *tokenizer.encode("b")]) == "ab"


def test_prompt_error_when_text_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>"}])
def test_eos_is_read_from_a_string_or_an_object(write_tokenizer: Callable[..., Path], eos: object) -> None:
    tokenizer = Tokenizer(write_tokenizer(eos_token=eos))
    assert tokenizer.eos_token_id == tokenizer.control_tokens["<|im_end|>"]


@pytest.mark.parametrize("eos", [None, "", "no such token", 3, ["<|im_end|>"]])
def test_eos_is_absent_when_no_token_is_named(write_tokenizer: Callable[..., Path], eos: object) -> None:
    assert Tokenizer(write_tokenizer(eos_token=eos)).eos_token_id is None


def test_settings_are_empty_when_there_is_no_file(write_tokenizer: Callable[..., Path]) -> None:
    folder = write_tokenizer()
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).settings == {}


def test_truncation_and_padding_in_the_file_are_ignored(write_tokenizer: Callable[..., Path]) -> None:
    folder = write_tokenizer()
    limited = plain(folder)
    limited.enable_truncation(3)
    limited.enable_padding(length=9)
    limited.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer(folder).encode("0 1 2 3 4 5 6 7 8 9")) > 9
    assert len(Tokenizer(folder).encode("0")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json does not exist"),
        ("", "is an empty file"),
        ("{}", "is not a tokenizer"),
        ('{"version": "1.0"}', "is not a tokenizer"),
    ],
)
def test_config_error_when_there_is_no_tokenizer(
    write_tokenizer: Callable[..., Path], content: str | None, message: str
) -> None:
    folder = write_tokenizer()
    (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer(folder)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_config_error_when_a_tokenizer_is_not_byte_level(
    write_tokenizer: Callable[..., Path], decoder: dict | None
) -> None:
    folder = write_tokenizer()
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "decoder": decoder}))
    with pytest.raises(ConfigError, match="must be a byte-level tokenizer"):
        Tokenizer(folder)
