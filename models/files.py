"""Files that others may have written: bounded reads, strict JSON, checksums, free space."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import ConfigError, FastVLMError, OutputError
from .foreign_files import foreign_bytes, foreign_text

MAX_JSON_BYTES = 16 * 2**20
"""The largest JSON file that is read, in bytes. A tokenizer of 150,000 tokens takes 7 to 11 MB, and no other file comes
near it. Python's objects take up to twenty times as much."""

MAX_DEPTH = 64
"""The deepest nesting that is accepted. Real files nest ten levels at most."""

MAX_DIGITS = 40
"""The longest integer that is accepted, in digits. Hugging Face writes 10**30 for "no limit"."""

SAMPLE_SPANS = 16
"""The number of spans that `sample_sha256` reads."""
SAMPLE_SPAN_BYTES = 8192
"""The length of each of those spans, in bytes."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""The encoding that a byte order mark at the start names. Windows' editors and PowerShell write them."""

T = TypeVar("T", int, float, bool, str)


def is_file(path: Path) -> bool:
    """Returns True for a regular file, and False for a name that no file can have (such as 100,000 characters)."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # some versions of Python raise here
        return False


def check_space(destination: Path, needed_bytes: int) -> None:
    """Raises OutputError when the file system of `destination` has less than `needed_bytes` free."""
    existing = next(parent for parent in [destination, *destination.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"{destination}: not enough space (needs about {needed_bytes / 1e6:,.0f} MB while it is written, "
            f"{free / 1e6:,.0f} MB are free). Free some space or choose another disk."
        )


def read_bounded(path: Path, error: type[FastVLMError], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Returns the content of a regular file. Raises `error` for a missing, unreadable or too large file."""
    try:
        if path.exists() and not path.is_file():  # a read from a pipe could block forever
            raise error(f"{path} is not a regular file")
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
            if len(content) > max_bytes:
                size = path.stat().st_size
                raise error(f"{path} is too large: must be at most {max_bytes} bytes, got {size}")
            return content
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from reason


def read_json_object(path: Path, error: type[FastVLMError] = ConfigError) -> dict[str, Any]:
    """Returns the JSON object in `path`. Raises `error` for a missing, too large or malformed file."""
    return parse_json_object(read_bounded(path, error), str(path), error)


def parse_json_object(content: bytes, name: str, error: type[FastVLMError] = ConfigError) -> dict[str, Any]:
    """Returns the JSON object in `content`. Raises `error`, with `name` as its subject, for anything else.

    Stricter than JSON, it refuses NaN and infinity, numbers of more than `MAX_DIGITS` digits, duplicate keys and
    nesting beyond `MAX_DEPTH`. It also refuses a lone surrogate, which UTF-8 cannot encode. A byte order mark is read.
    """
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
            object_pairs_hook=_unique_keys,
        )
        _check_depth(value)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{name} is not valid JSON: it contains a lone surrogate") from None
    except (ValueError, RecursionError) as reason:  # malformed, not UTF-8, or too deep for the parser
        if foreign := foreign_bytes(content) or foreign_text(content):
            raise error(f"{name} is {foreign}", "allow_pickle") from None
        raise error(f"{name} is not valid JSON: {reason!s:.200}") from None
    if not isinstance(value, dict):
        raise error(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name:.80} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {duplicate!r:.80}")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level, depth = [item for part in inner for item in part if isinstance(item, dict | list)], depth + 1


def field(values: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """Returns `values[key]` as `kind`, or `default`. Raises ConfigError for a missing key or another type.

    An integer passes for a float, a bool never passes for a number, and null counts as missing.
    """
    value = values.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"config.json: {key!r} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return kind(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config.json: {key!r} must be of type {kind.__name__}, got {value!r:.80}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` with an indent of two spaces, unescaped, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Returns the sha256 of the whole file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(paths: Iterable[Path]) -> str:
    """Returns the sha256 over the sha256 of each file, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def sample_sha256(path: Path) -> str:
    """Returns the sha256 of the size and of 16 spans of 8 KiB, spread from the first byte to the last, in hex.

    Two exports with different weights have files of the same sizes. This distinguishes them in a millisecond, where a
    full hash of gigabytes takes seconds. It does not see a change between the spans.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        for span in range(SAMPLE_SPANS):
            stream.seek(max(0, size - SAMPLE_SPAN_BYTES) * span // (SAMPLE_SPANS - 1))
            digest.update(stream.read(SAMPLE_SPAN_BYTES))
    return digest.hexdigest()
