"""Messages and images -> prompt ids.

The chat template is rendered with stand-ins for what users wrote (so its filters do not reach that). Control tokens
are looked up only in what the template wrote itself; users' text is put in afterwards, and encoded as text whatever it
says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models.errors import ConfigError, PromptError
from ..models.tokenizer_files import IMAGE_TOKEN, training_prompt
from .tokenizer import Tokenizer

STAND_IN = re.compile("\ue000([0-9]{1,6})\ue001")
"""Private-use characters, which no template holds."""


@dataclass(frozen=True)
class Message:
    """One turn. `image_count` images belong to it, at the `<image>` marks in `content` or, without marks, before it."""

    role: str
    content: str
    image_count: int = 0
    ids: tuple[int, ...] | None = None
    """Of an answer: the ids that were generated, which its text need not be encoded to."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, with `image_token_index` once per image."""

    ids: tuple[int, ...]
    image_token_index: int
    places: frozenset[int]
    """Where in `ids` images stand: a model may have answered with `image_token_index`, too."""

    @property
    def image_count(self) -> int:
        return len(self.places)

    def token_count(self, tokens_per_image: int) -> int:
        """Positions that the prompt takes in the decoder."""
        return len(self.ids) + self.image_count * (tokens_per_image - 1)


Content = str | tuple[int, ...]
"""Text that is to be encoded, or ids that are there."""

Part = int | Content

Render = Callable[[Sequence[dict[str, str]]], str]


class PromptEncoder:
    """Chat messages -> ids, with the template that the folder brings (built-in: Apple's training prompt `qwen_2`).

    Raises:
        ConfigError: the folder's template is malformed.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, image_token_index: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_index = image_token_index
        template = _template_text(folder, tokenizer)
        self._render: Render = training_prompt if template is None else _jinja_render(template, tokenizer)
        self._pattern = _split_pattern(tokenizer)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """The ids of `messages` and of the beginning of the assistant's answer.

        Raises:
            PromptError: images and their marks differ in number, or the template cannot take these messages.
        """
        contents = [_content_parts(message) for message in messages]
        stand_ins = [
            {"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)
        ]
        try:
            rendered = self._render(stand_ins)
        except PromptError:
            raise
        except Exception as reason:  # a template is a program, and fails in its own ways
            raise PromptError(f"the chat template cannot take these messages: {reason}") from reason
        self._check_nothing_lost(rendered, messages)
        ids: list[int] = []
        places: list[int] = []
        for part in _joined(self._parts(rendered, contents)):
            if part == self._image_token_index:
                places.append(len(ids))
            ids.extend(self._tokenizer.encode(part) if isinstance(part, str) else _as_ids(part))
        return Prompt(tuple(ids), self._image_token_index, frozenset(places))

    def _parts(self, rendered: str, contents: Sequence[Sequence[Content | None]]) -> Iterator[Part]:
        """Text and ids in order. Both control tokens and image marks are ids; answers are ids together."""
        end = 0
        for match in self._pattern.finditer(rendered):
            yield rendered[end : match.start()]
            end = match.end()
            if match["content"] is None:
                assert match.lastgroup is not None
                yield self._tokenizer.control_tokens[match[match.lastgroup]]
                continue
            for part in contents[int(match["content"])]:
                yield self._image_token_index if part is None else part
        yield rendered[end:]

    def _check_nothing_lost(self, rendered: str, messages: Sequence[Message]) -> None:
        kept = {int(match[1]) for match in STAND_IN.finditer(rendered)}
        lost = [message.role for index, message in enumerate(messages) if index not in kept]
        if lost:
            raise PromptError(f"the model's chat template leaves out the {' and '.join(lost)} message")
        if len(kept) > len(messages):
            raise PromptError("the model's chat template writes private-use characters, which stand for messages here")


def _as_ids(part: int | tuple[int, ...]) -> tuple[int, ...]:
    return part if isinstance(part, tuple) else (part,)


def _content_parts(message: Message) -> Sequence[Content | None]:
    """The text or ids of a message, and None for each image in it. Only a user's message can hold images."""
    if message.ids is not None:
        return [message.ids]
    if message.role != "user":
        return [message.content]
    texts = message.content.split(IMAGE_TOKEN)
    marks = len(texts) - 1
    if marks == 0:
        return [part for _ in range(message.image_count) for part in (None, "\n")] + [message.content]
    if marks != message.image_count:
        raise PromptError(
            f"the prompt should have one {IMAGE_TOKEN} for each image, or none to have the images first; found "
            f"{IMAGE_TOKEN}: {marks}, images: {message.image_count}"
        )
    return [part for text in texts for part in (None, text)][1:]


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Adjacent texts as one, since a word may be made of both; without empty ones."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text


def _split_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches a stand-in or a control token, the longest first, with the blanks that the token swallows."""
    tokens = sorted(tokenizer.added_tokens, key=lambda token: -len(token.content))
    written = [
        ("\\s*" if token.lstrip else "") + f"(?P<t{i}>{re.escape(token.content)})" + ("\\s*" if token.rstrip else "")
        for i, token in enumerate(tokens)
    ]
    return re.compile("|".join(["\ue000(?P<content>[0-9]{1,6})\ue001", *written]))


def _template_text(folder: Path, tokenizer: Tokenizer) -> str | None:
    """The folder's template: its own file, or in tokenizer_config.json as one text or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            raise ConfigError(f"{file} cannot be read: {reason}") from None
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise ConfigError(
                f"tokenizer_config.json has no chat template named 'default'; found {sorted(map(str, named))}"
            )
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"tokenizer_config.json: chat_template should be a text; found {template!r:.80}")
    return template


def _jinja_render(template: str, tokenizer: Tokenizer) -> Render:
    """`template` as Hugging Face renders it, within bounds: it is a stranger's program."""
    from .template import ChatTemplate  # brings jinja2, which the built-in prompt does without

    compiled = ChatTemplate(template)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: text for name in names if (text := tokenizer.special_token_text(name)) is not None}
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True, tools=None, **tokens)
