"""A byte-level BPE tokenizer in Qwen2's format for models that have no trained one.

Any text can be encoded (every byte has a token), common English words take one or two tokens, and every id up to
`vocab_size` decodes to something readable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

from .tokenizer_json import CHAT_TEMPLATE as CHAT_TEMPLATE
from .tokenizer_json import added_token, byte_level_bpe, byte_symbols

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKEN_ROOM = 1
"""Ids kept free behind the special tokens: export adds `<image>` there."""

WORDS = """
    system user assistant You Describe What How Where Is Are The There image picture
    a are assistant at circle colour describe do does has have helpful how image in is it many of on photo picture
    say see shown square text that the there this to user what where which with word written you
""".split()


@dataclass(frozen=True)
class SyntheticTokenizer:
    json: str
    """The content of `tokenizer.json`."""
    eos_token_id: int


def synthetic_tokenizer(vocab_size: int) -> SyntheticTokenizer:
    """A tokenizer that fills `vocab_size` ids but for the room that `<image>` needs."""
    first_special = vocab_size - len(SPECIAL_TOKENS) - IMAGE_TOKEN_ROOM
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    merges: dict[tuple[str, str], None] = {}
    for word in [*("Ġ" + word for word in WORDS), *WORDS]:
        for end in range(1, len(word)):
            if len(vocab) < first_special:
                merges[word[:end], word[end]] = None
                vocab.setdefault(word[: end + 1], len(vocab))
    for syllables in islice(_pseudo_words(), 2 * vocab_size):
        if len(vocab) == first_special:
            break
        vocab.setdefault(syllables, len(vocab))
    special = [added_token(first_special + i, content) for i, content in enumerate(SPECIAL_TOKENS)]
    return SyntheticTokenizer(json.dumps(byte_level_bpe(vocab, list(merges), special)), first_special + 2)


def _pseudo_words() -> Iterator[str]:
    syllables = [a + b for a, b in product("bdfghjklmnprstvwz", "aeiou")]
    for count in (1, 2, 3):
        for parts in product(syllables, repeat=count):
            yield "Ġ" + "".join(parts)
