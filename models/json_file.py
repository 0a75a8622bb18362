"""JSON objects from files that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, FastVLMError

MAX_JSON_BYTES = 64 * 2**20
"""A tokenizer of 150,000 tokens takes 7-11 MB; nothing that we read comes near this."""

T = TypeVar("T", int, float, bool, str)


def read_json_object(path: Path, error: type[FastVLMError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` when it is missing, too large, malformed or no object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(f"{path} has {size} bytes; a file of this kind stays under {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason
    except (ValueError, RecursionError) as reason:  # malformed, not UTF-8, NaN, or nested beyond measure
        raise error(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path} should hold a JSON object; found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


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
