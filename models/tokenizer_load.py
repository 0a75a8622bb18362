"""`tokenizer.json` from a stranger -> the `tokenizers` library's tokenizer, if it is one that Qwen2 could have.

The library runs whatever normalizers and regular expressions a file names: some panic, some take for ever. Qwen2's are
known, so that anything else is refused instead of tried.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, FastVLMError
from .tokenizer_json import PIECES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 32 * 2**20
"""Qwen2's takes 7-11 MB."""

NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Sequence"))
PRE_TOKENIZERS = frozenset(("ByteLevel", "Digits", "Sequence", "Split"))


def load_tokenizer(content: bytes, name: str) -> Tokenizer:
    """The byte-level BPE tokenizer that `content`, the file called `name`, holds.

    Raises:
        ConfigError: it is malformed, no byte-level BPE, random, or normalizes or cuts text as Qwen2's does not.
    """
    from tokenizers import Tokenizer, decoders, models

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as reason:
        raise library_error(reason, ConfigError, f"{name} is no tokenizer") from None
    if not isinstance(tokenizer.model, models.BPE):
        raise ConfigError(f"{name} should hold a BPE tokenizer, as Qwen2's is; found {type(tokenizer.model).__name__}")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ConfigError(f"{name} should hold a byte-level tokenizer, as Qwen2's is; found {tokenizer.decoder!s:.80}")
    if tokenizer.model.dropout is not None:
        raise ConfigError(f"{name} drops merges at random; a model is used with 'dropout' null")
    for part in _parts(tokenizer.normalizer):
        if part.get("type") not in NORMALIZERS:
            raise ConfigError(f"{name} normalizes text with {part.get('type')!r:.40}; Qwen2's does with NFC")
    for part in _parts(tokenizer.pre_tokenizer):
        if part.get("type") not in PRE_TOKENIZERS:
            raise ConfigError(f"{name} cuts text with {part.get('type')!r:.40}; Qwen2's does with Split and ByteLevel")
        if "Regex" in part.get("pattern", {}) and part["pattern"]["Regex"] != PIECES:
            raise ConfigError(
                f"{name} cuts text by the pattern {part['pattern']['Regex']!r:.80}, which is not Qwen2's: a pattern "
                "can take for ever, so no other is tried"
            )
    return tokenizer


def library_error(reason: BaseException, error: type[FastVLMError], what: str) -> FastVLMError:
    """`error` for what the library raised: bare Exception, or a panic, which is none. Others are raised again."""
    if not isinstance(reason, Exception) and type(reason).__name__ != "PanicException":
        raise reason
    detail = (str(reason) or type(reason).__name__).splitlines()[0]
    return error(f"{what}: {detail:.200}")


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer and those inside it, as `tokenizer.json` describes them."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
