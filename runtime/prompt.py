"""Messages and images -> prompt ids.

The chat template is rendered with placeholders for the users' text, so its filters never see that text. Control tokens
are looked up only in the template's own output. The users' text is inserted afterwards and always encoded as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models.chat_template import TEMPLATE_FILE, check_family, renderer, template_text, turn_end
from ..models.errors import ConfigError, PromptError
from ..models.tokenizer_files import IMAGE_TOKEN
from .tokenizer import Tokenizer

RAW = "raw"
"""The role of a message that is the whole prompt by itself, without a chat template."""

PLACEHOLDER = re.compile("\ue000([0-9]{1,6})\ue001")
"""The placeholder of a message's text: its index between private-use characters, which templates do not use."""


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    Its `image_count` images are placed at the `<image>` marks in `content`, or before the text if it has none.
    A message of the role `raw` is the whole prompt, which no template surrounds.
    """

    role: str
    content: str
    image_count: int = 0
    ids: tuple[int, ...] | None = None
    """The ids that were generated for an answer. Encoding its text may give other ids."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, with `image_token_index` once per image."""

    ids: tuple[int, ...]
    image_token_index: int
    places: frozenset[int]
    """The indices of the images in `ids`. A model may also have generated `image_token_index` in an answer."""

    @property
    def image_count(self) -> int:
        """The number of images."""
        return len(self.places)

    def token_count(self, tokens_per_image: int) -> int:
        """Returns the number of positions that the prompt takes in the decoder."""
        return len(self.ids) + self.image_count * (tokens_per_image - 1)


Content = str | tuple[int, ...]
"""Text to encode, or ids."""

Part = int | Content
"""A control token or an image mark as its id, or content."""


class PromptEncoder:
    """Chat messages -> ids, with the template in the folder, or else Apple's training prompt `qwen_2`.

    Attributes:
        turn_end_id: the id that the template writes after an answer, which ends it, or None.

    Raises:
        ConfigError: the folder's template is malformed, or another model family's.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, image_token_index: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_index = image_token_index
        self._render = renderer(template_text(_own_template(folder), tokenizer.settings), tokenizer.settings)
        check_family(self._render, tokenizer.control_tokens)
        self.turn_end_id = turn_end(self._render, tokenizer.control_tokens)
        self._pattern = _split_pattern(tokenizer)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Returns the ids of `messages` and of the start of the assistant's answer.

        Raises:
            PromptError: images and their marks differ in number, or the template cannot take these messages.
        """
        contents = [_content_parts(message) for message in messages]
        placeholders = [
            {"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)
        ]
        try:
            raw = [message.role for message in messages] == [RAW]
            rendered = placeholders[0]["content"] if raw else self._render(placeholders)
        except PromptError:
            raise
        except Exception as reason:  # a template is a program and can raise anything
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
        """Yields text and ids in order. Control tokens and image marks are single ids, answers are tuples of ids."""
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
        kept = {int(match[1]) for match in PLACEHOLDER.finditer(rendered)}
        lost = [message.role for index, message in enumerate(messages) if index not in kept]
        if lost:
            raise PromptError(f"the model's chat template leaves out the {' and '.join(lost)} message")
        if len(kept) > len(messages):
            raise PromptError("the model's chat template writes private-use characters, which are reserved here")


def _as_ids(part: int | tuple[int, ...]) -> tuple[int, ...]:
    return part if isinstance(part, tuple) else (part,)


def _content_parts(message: Message) -> Sequence[Content | None]:
    """Returns the text or ids of a message, and None for each of its images. Only a user's message has images."""
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
            f"the prompt must have one {IMAGE_TOKEN} for each image (got {IMAGE_TOKEN}: {marks}, images: "
            f"{message.image_count}). Leave out {IMAGE_TOKEN} to place the images before the text."
        )
    return [part for text in texts for part in (None, text)][1:]


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Joins adjacent texts, since a token may span both, and leaves out empty ones."""
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
    """Returns a pattern of placeholders and control tokens, the longest first, with the blanks that a token strips."""
    tokens = sorted(tokenizer.added_tokens, key=lambda token: -len(token.content))
    written = [
        ("\\s*" if token.lstrip else "") + f"(?P<t{i}>{re.escape(token.content)})" + ("\\s*" if token.rstrip else "")
        for i, token in enumerate(tokens)
    ]
    return re.compile("|".join(["\ue000(?P<content>[0-9]{1,6})\ue001", *written]))


def _own_template(folder: Path) -> str | None:
    """Returns the content of the template's own file, if the folder has it."""
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as reason:
        raise ConfigError(f"{file} cannot be read: {reason}") from None
