"""Qwen2's tokenizer files, and FastVLM's training prompt.

A `tokenizer.json` is untrusted: the `tokenizers` library runs every normalizer and regular expression that a file
names, and some panic or never end. Only those that Qwen2 uses are accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, FastVLMError
from .files import parse_json_object
from .foreign_files import foreign_bytes, foreign_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 32 * 2**20
"""The largest `tokenizer.json` that is read, in bytes. Qwen2's takes 7 to 11 MB."""

NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Sequence"))
PRE_TOKENIZERS = frozenset(("ByteLevel", "Digits", "Sequence", "Split"))

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression that splits text before merging, from Qwen2's `tokenizer.json`."""

IMAGE_TOKEN = "<image>"
"""The token of an image, in prompts and in the exported tokenizer."""
START, END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", START, END)

# The training prompt: `conv_qwen_2` in LLaVA's conversation.py, `qwen_2` in Apple's ml-fastvlm.

DEFAULT_SYSTEM = "You are a helpful assistant."


def turn(role: str, content: str) -> str:
    """Returns one message of the training prompt."""
    return f"{START}{role}\n{content}{END}\n"


SYSTEM_TURN = turn("system", DEFAULT_SYSTEM)
ANSWER_START = f"{START}assistant\n"

BEFORE_IMAGE = f"{SYSTEM_TURN}{START}user\n"
BEFORE_QUESTION = "\n"
BEFORE_ANSWER = f"{END}\n{ANSWER_START}"
"""The parts of the training prompt with one image, in front of the image, the question and the answer."""


def training_prompt(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Returns the training prompt for `messages` with `role` and `content`, up to the answer."""
    system = "" if messages[0]["role"] == "system" else SYSTEM_TURN
    turns = (turn(message["role"], message["content"]) for message in messages)
    return "".join([system, *turns, ANSWER_START if add_generation_prompt else ""])


def _chat_template(one_turn: str) -> str:
    """Returns the training prompt as a Jinja template. `one_turn` writes the variable `message`."""
    system, answer = (text.replace("\n", "\\n") for text in (SYSTEM_TURN, ANSWER_START))
    return (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        f"{{{{ '{system}' }}}}{{% endif %}}{one_turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{answer}' }}}}{{% endif %}}"
    )


CHAT_TEMPLATE = _chat_template(
    f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] + '{END}\\n' }}}}",
)
"""The training prompt for messages whose content is a string."""

PARTS_CHAT_TEMPLATE = _chat_template(
    f"{{{{ '{START}' + message['role'] + '\\n' }}}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_TOKEN}\\n' }}}}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{{{{ '{END}\\n' }}}}"
)
"""The training prompt for messages whose content is a string or a list of texts and images."""

CONTENT_PARTS = re.compile(r"selectattr\(\s*['\"]type['\"]|\[\s*['\"]type['\"]\s*\]|\.type\b")
"""The sign of a template that only accepts parts (`[{"type": "image"}, {"type": "text", "text": ...}]`)."""


def with_plain_template(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns tokenizer files whose chat template accepts strings.

    Hugging Face's FastVLM template iterates over the parts of a message's content and writes nothing for a string. It
    is replaced by the training prompt, which is also its output for one image and a text.

    Raises:
        ConfigError: `tokenizer_config.json` is malformed.
    """
    files = dict(files)
    if _accepts_only_parts(files.get("chat_template.jinja", b"").decode("utf-8", "replace")):
        files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    content = files.get("tokenizer_config.json")
    if content is not None and b"chat_template" in content:
        settings = parse_json_object(content, "tokenizer_config.json", ConfigError)
        template = settings.get("chat_template")
        if isinstance(template, str) and _accepts_only_parts(template):
            settings["chat_template"] = CHAT_TEMPLATE
            files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    return files


def _accepts_only_parts(template: str) -> bool:
    return bool(CONTENT_PARTS.search(template)) and "is string" not in template


def byte_symbols() -> list[str]:
    """Returns the printable character for each byte 0..255 in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], added_tokens: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns a `tokenizer.json` for byte-level BPE that normalizes and splits text as Qwen2's does."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [" ".join(pair) for pair in merges],  # the form that older readers also accept
        },
    }


def added_token(token_id: int, content: str) -> dict[str, Any]:
    """Returns an entry of `added_tokens` in `tokenizer.json`."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def image_token_id(tokenizer: Mapping[str, Any]) -> int | None:
    """Returns the id of `<image>` in a `tokenizer.json`, or None."""
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and token.get("content") == IMAGE_TOKEN and isinstance(token.get("id"), int):
            return token["id"]
    return None


def largest_token_id(files: Mapping[str, bytes]) -> int:
    """Returns the largest id in the `tokenizer.json` of tokenizer files, or -1 without one. Raises ConfigError."""
    if "tokenizer.json" not in files:
        return -1
    tokenizer = load_tokenizer(files["tokenizer.json"], "tokenizer.json")
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def load_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Returns the byte-level BPE tokenizer in `content`. Errors have `name` as their subject.

    Raises:
        ConfigError: the file is malformed, not byte-level BPE, or random, or it normalizes or splits text in another
            way than Qwen2's.
    """
    from tokenizers import Tokenizer, decoders, models

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as reason:
        if foreign := foreign_bytes(content) or foreign_text(content):
            raise ConfigError(f"{name} is {foreign}", "allow_pickle") from None
        raise library_error(reason, ConfigError, f"{name} is not a tokenizer") from None
    if not isinstance(tokenizer.model, models.BPE):
        raise ConfigError(f"{name} must be a BPE tokenizer, got {type(tokenizer.model).__name__}")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ConfigError(f"{name} must be a byte-level tokenizer, got {tokenizer.decoder!s:.80}")
    if tokenizer.model.dropout is not None:
        raise ConfigError(f"{name} drops merges at random: 'dropout' must be null")
    for part in _components(tokenizer.normalizer):
        if part.get("type") not in NORMALIZERS:
            raise ConfigError(f"{name}: the normalizer must be NFC, as Qwen2's, got {part.get('type')!r:.40}")
    for part in _components(tokenizer.pre_tokenizer):
        if part.get("type") not in PRE_TOKENIZERS:
            raise ConfigError(
                f"{name}: the pre-tokenizer must be Split and ByteLevel, as Qwen2's, got {part.get('type')!r:.40}"
            )
        if "Regex" in part.get("pattern", {}) and part["pattern"]["Regex"] != PIECES:
            raise ConfigError(
                f"{name}: pre-tokenizer regex {part['pattern']['Regex']!r:.80} is not Qwen2's. Others are refused "
                "because they could hang the tokenizer."
            )
    return tokenizer


def library_error(reason: BaseException, error: type[FastVLMError], subject: str) -> FastVLMError:
    """Returns `error` for an exception or panic of the library. Others, such as KeyboardInterrupt, are raised again."""
    if not isinstance(reason, Exception) and type(reason).__name__ != "PanicException":
        raise reason
    detail = (str(reason) or type(reason).__name__).splitlines()[0]
    return error(f"{subject}: {detail:.200}")


def _components(component: Any) -> Iterator[dict[str, Any]]:
    """Yields a normalizer or pre-tokenizer and those inside it, as `tokenizer.json` describes them."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
