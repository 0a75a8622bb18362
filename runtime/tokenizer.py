"""Text <-> token ids, with the folder's `tokenizer.json` but without transformers, whose import takes seconds."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.chat_template import special_token_text
from ..models.errors import ConfigError, PromptError
from ..models.files import read_bounded, read_json_object
from ..models.tokenizer_files import MAX_TOKENIZER_BYTES, byte_symbols, library_error, load_tokenizer

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A byte-level BPE tokenizer that keeps text and control tokens apart.

    Attributes:
        settings: the content of tokenizer_config.json, empty if the folder does not have it.
        control_tokens: the ids of the added tokens (`<|im_start|>`, `<image>` ...). Text is never encoded as one.
        hidden_ids: the control tokens that an answer's text leaves out.
        added_tokens: the added tokens with their flags.

    Raises:
        ConfigError: a file is missing or malformed, or the tokenizer is not a byte-level one.
    """

    def __init__(self, folder: Path) -> None:
        self.settings = _settings(folder)
        self._tokenizer = _load(folder / "tokenizer.json")
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_tokens: Mapping[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.hidden_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_tokens = tuple(added.values())
        # `encode_special_tokens` keeps special tokens out of text, so every added token is made special.
        self._tokenizer.add_special_tokens(list(added.values()))
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them a control token. Raises PromptError for text that is not Unicode."""
        check_unicode("the prompt", text)
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as reason:
            raise library_error(reason, PromptError, "the tokenizer cannot encode the prompt") from None

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token. Hidden control tokens and ids past the vocabulary have none."""
        if token_id in self.hidden_ids:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # Qwen2's embeddings are padded past the tokenizer
            return b""
        table = _byte_of_symbol()
        if all(symbol in table for symbol in token):
            return bytes(table[symbol] for symbol in token)
        return token.encode()  # an added token is its own text

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without an incomplete character at the end."""
        stream = TextStream(self)
        return "".join(stream.push(token_id) for token_id in ids)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token` in tokenizer_config.json."""
        return self.control_tokens.get(special_token_text(self.settings, "eos_token") or "")


def check_unicode(subject: str, text: object) -> None:
    """Raises PromptError for a string that UTF-8 cannot encode. Python makes them of bytes that are not UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError as reason:
        raise PromptError(
            f"{subject} is not valid Unicode at character {reason.start:,}: half of a surrogate pair, or bytes that "
            "are not UTF-8. Correct or convert it."
        ) from None


class TextStream:
    """A decoder of token ids, one after the other, into whole characters.

    A character whose bytes are spread over several tokens is returned with the last of them. An incomplete character is
    never returned. Bytes that cannot be UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the characters that `token_id` completes: none, one or several."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist. A model folder needs the tokenizer that its decoder was trained with."
        )
    tokenizer = load_tokenizer(read_bounded(path, ConfigError, MAX_TOKENIZER_BYTES), str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}
