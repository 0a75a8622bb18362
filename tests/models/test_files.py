"""JSON from untrusted files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastvlm.models.errors import ConfigError, UsageError
from fastvlm.models.files import MAX_DEPTH, MAX_JSON_BYTES, parse_json_object, read_json_object


def test_values_of_real_files_are_read() -> None:
    text = '{"model_max_length": 1000000000000000019884624838656, "x": [1.5e-3, "\\ud83d\\ude00", null], "y": {"z": 1}}'
    assert parse_json_object(text.encode(), "f") == {
        "model_max_length": 10**30 + 19884624838656,
        "x": [0.0015, "😀", None],
        "y": {"z": 1},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "f is an empty file.*Download it again"),
        (b"\0" * 99, "f is a file of zeros"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n",
            "f is a git-lfs pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html></html>", "f is a web page"),
        (b"Entry not found", "f is a text, not the file itself .it begins with 'Entry not found'"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is not a JSON number"),
        (b'{"a": ' + b"9" * 100 + b"}", "a number has 100 digits"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "a number has 10000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        (b'{"a": "\\ud800"}', "contains a lone surrogate"),
        (b'{"\\uDFFF": 1}', "contains a lone surrogate"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{", "not valid JSON"),
        (b'{"a": {"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}}", "nested more than"),
        (b'{"a": ' * 100_000 + b"}" * 100_000, "not valid JSON"),
    ],
)
def test_config_error_when_json_cannot_be_trusted(content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_json_object(content, "f")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_byte_order_marks_are_read(encoding: str) -> None:
    assert parse_json_object('{"a": "ä"}'.encode(encoding), "f") == {"a": "ä"}


def test_many_repeated_keys_are_read_fast() -> None:
    content = b"{" + b",".join(b'"%d": 0' % k for k in range(200_000)) + b',"199999": 0}'
    with pytest.raises(ConfigError, match="duplicate key '199999'"):
        parse_json_object(content, "f")


def test_error_when_a_file_is_too_large_or_no_file(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ConfigError, match=f"must be at most {MAX_JSON_BYTES} bytes, got {MAX_JSON_BYTES + 1}"):
        read_json_object(large)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a regular file"):
        read_json_object(tmp_path / "pipe", UsageError)
    with pytest.raises(UsageError, match="does not exist"):
        read_json_object(tmp_path / "absent", UsageError)
