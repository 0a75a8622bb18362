"""JSON objects from files that somebody else wrote."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import ConfigError, FastVLMError

MAX_JSON_BYTES = 16 * 2**20
"""A tokenizer of 150,000 tokens takes 7-11 MB; nothing else that we read comes near this. Python takes up to twenty
times as much for the objects."""

MAX_DEPTH = 64
"""Real files nest ten deep at most."""

MAX_DIGITS = 40
"""Of a whole number: Hugging Face writes 10**30 for "no limit"."""

T = TypeVar("T", int, float, bool, str)


def read_json_object(path: Path, error: type[FastVLMError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` when it is missing, too large, malformed or no object."""
    return parse_json_object(read_bounded(path, error), str(path), error)


def read_bounded(path: Path, error: type[FastVLMError], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of a regular file. Raises `error` when it is missing, cannot be read, or has more than `max_bytes`."""
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise error(f"{path} is no regular file")
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
            if len(content) > max_bytes:
                size = path.stat().st_size
                raise error(f"{path} has {size} bytes; a file of this kind stays under {max_bytes}")
            return content
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason


def parse_json_object(content: bytes, name: str, error: type[FastVLMError] = ConfigError) -> dict[str, Any]:
    """The JSON object that `content` is. Raises `error`, which calls it `name`, when it is none that can be trusted.

    Refused, beyond what JSON itself forbids: NaN and infinity, numbers of more than `MAX_DIGITS` digits, a key that
    comes twice, nesting beyond `MAX_DEPTH`, half a surrogate pair (which no file could be written with).
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded, object_pairs_hook=_unique
        )
        _check_depth(value)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{name} is not valid JSON: it holds half of a surrogate pair") from None
    except (ValueError, RecursionError) as reason:  # malformed, not UTF-8, or nested beyond measure
        raise error(f"{name} is not valid JSON: {reason!s:.200}") from None
    if not isinstance(value, dict):
        raise error(f"{name} should hold a JSON object; found {type(value).__name__}")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name:.80} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _bounded(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} comes twice")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level, depth = [item for part in inner for item in part if isinstance(item, dict | list)], depth + 1


def field(values: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """`values[key]` as `kind`, or `default`. Raises ConfigError when it is missing or of another type.

    An integer passes for a float; a bool never passes for a number. JSON's null counts as missing.
    """
    value = values.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"config.json lacks {key!r}, which a FastVLM checkpoint must name")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return kind(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config.json: {key!r} should be of type {kind.__name__}; found {value!r:.80}")
    return value
