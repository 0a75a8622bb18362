"""The chat template of a folder: where it is, how it is rendered, whether it fits the tokenizer, and how a turn ends.

A template of another model's family is a common fault of converted folders. Its marks are encoded as plain text, and
the model answers with nonsense such as `<start_of_turn>model`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from .errors import ConfigError, PromptError
from .tokenizer_files import training_prompt

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens that a template may write, by their keys in tokenizer_config.json."""

REMEDY = "Remove it to use FastVLM's training prompt, or copy the one that the model was trained with."

FAMILIES = {
    "<start_of_turn>": "Gemma",
    "<|turn>": "Gemma",
    "[INST]": "Mistral and Llama 2",
    "<<SYS>>": "Llama 2",
    "<|start_header_id|>": "Llama 3",
    "<|user|>": "Phi and Zephyr",
    "<\uff5cUser\uff5c>": "DeepSeek",
    "<|START_OF_TURN_TOKEN|>": "Cohere",
    "<|start_of_role|>": "Granite",
    "<fim_prefix>": "StarCoder",
}
"""The model families by a mark that only their templates write."""
MARK = re.compile(rf"{'|'.join(map(re.escape, FAMILIES))}|<\|[^|<>\s]{{1,40}}\|>")
"""A mark that is a token in the model that a template was written for."""

QUESTION, ANSWER = "\ue0000\ue001", "\ue0001\ue001"
"""The placeholders of a question and an answer, of private-use characters."""


class Render(Protocol):
    """A function from messages with `role` and `content` to the text of the prompt."""

    def __call__(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str: ...


def template_text(own_file: str | None, settings: Mapping[str, Any]) -> str | None:
    """Returns the template in its own file, or else in tokenizer_config.json: a string, or a list of named ones.

    Raises:
        ConfigError: the setting is malformed.
    """
    if own_file is not None:
        return own_file
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise ConfigError(
                f"tokenizer_config.json must have a chat template named 'default' (got {sorted(map(str, named))})"
            )
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"tokenizer_config.json: chat_template must be a string (got {template!r:.80})")
    return template


def special_token_text(settings: Mapping[str, Any], name: str) -> str | None:
    """Returns the text of `eos_token` and its like in tokenizer_config.json: a string, or an object's `content`."""
    value = settings.get(name)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def renderer(template: str | None, settings: Mapping[str, Any]) -> Render:
    """Returns a function that renders an untrusted template as Hugging Face does, within bounds.

    Without a template it writes FastVLM's training prompt.

    Raises:
        ConfigError: the template is malformed, or uses a feature that is not allowed.
    """
    if template is None:
        return training_prompt
    from .template import ChatTemplate  # imports jinja2, which the training prompt does not need

    compiled = ChatTemplate(template)
    tokens = {name: text for name in SPECIAL_NAMES if (text := special_token_text(settings, name)) is not None}

    def render(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        return compiled.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            **tokens,
        )

    return render


def check_renders(render: Render) -> None:
    """Raises ConfigError unless the template makes a prompt of a plain question."""
    try:
        rendered = render([{"role": "user", "content": QUESTION}])
    except PromptError as reason:
        raise ConfigError(f"{str(reason).rstrip('.')}. {REMEDY}") from None
    except Exception as reason:  # a template is a program and can raise anything
        raise ConfigError(f"the chat template cannot take a question: {reason!s:.200}. {REMEDY}") from None
    if QUESTION not in rendered:
        raise ConfigError(f"the chat template leaves out the question. {REMEDY}")


def check_family(render: Render, tokens: Collection[str]) -> None:
    """Raises ConfigError if the template writes the marks of another family, which are not among `tokens`.

    A template that cannot render a question passes, and so does the training prompt.
    """
    if render is training_prompt:
        return
    try:
        rendered = render([{"role": "user", "content": QUESTION}])
    except Exception:  # reported by `check_renders`, or by the first prompt
        return
    for mark in MARK.findall(rendered):
        if mark not in tokens:
            family = f"that of {FAMILIES[mark]}" if mark in FAMILIES else "another model's"
            raise ConfigError(
                f"the chat template is {family}: it writes {mark}, which is not a token of this tokenizer. {REMEDY}"
            )


def begins_answer(render: Render) -> bool:
    """Returns True if the template begins an answer where it is asked to, as `add_generation_prompt` does.

    Without a beginning a model often continues the question, or ends at once.
    """
    question = [{"role": "user", "content": QUESTION}]
    try:
        return render(question) != render(question, add_generation_prompt=False) or not _ends_turn(render(question))
    except Exception:  # reported by `check_renders`, or by the first prompt
        return True


def _ends_turn(rendered: str) -> bool:
    """Returns True if nothing but a mark follows the question."""
    return re.fullmatch(r"(<[^<>]*>)?\s*", rendered.rpartition(QUESTION)[2]) is not None


def turn_end(render: Render, tokens: Mapping[str, int]) -> int | None:
    """Returns the id of the token that the template writes directly after an answer, or None.

    `tokens` are the control tokens by their text. The model was trained to end an answer with it, also where the
    configs name another token.
    """
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = render(messages, add_generation_prompt=False)
    except Exception:  # some templates take one message only
        return None
    _, found, after = rendered.partition(ANSWER)
    if not found:
        return None
    after = after.lstrip()
    longest = max((text for text in tokens if after.startswith(text)), key=len, default=None)
    return None if longest is None else tokens[longest]
