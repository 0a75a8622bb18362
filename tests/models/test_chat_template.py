"""Chat templates: where they are, whether they belong to the tokenizer, and the token that ends an answer."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm.models.chat_template import (
    FAMILIES,
    begins_answer,
    check_family,
    check_renders,
    renderer,
    special_token_text,
    template_text,
    turn_end,
)
from fastvlm.models.errors import ConfigError
from fastvlm.models.tokenizer_files import CHAT_TEMPLATE, PARTS_CHAT_TEMPLATE, training_prompt

TOKENS = {"<|endoftext|>": 7, "<|im_start|>": 8, "<|im_end|>": 9, "<image>": 10}
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}"
)
VICUNA = "{% for m in messages %}{{ m.role|upper + ': ' + m.content + ' ' }}{% endfor %}ASSISTANT:"


@pytest.mark.parametrize(("template", "family"), [(GEMMA, "Gemma"), (LLAMA3, "Llama 3")])
def test_template_of_another_family_is_named(template: str, family: str) -> None:
    render = renderer(template, {"bos_token": "<bos>"})
    with pytest.raises(
        ConfigError, match=f"the chat template is that of {family}: it writes <.*not a token.*Remove it"
    ):
        check_family(render, TOKENS)


@pytest.mark.parametrize("mark", [*FAMILIES, "<|something|>"])
def test_each_mark_counts_unless_the_tokenizer_has_it(mark: str) -> None:
    render = renderer("{{ messages[0].content }}" + mark, {})
    with pytest.raises(ConfigError, match="is not a token of this tokenizer"):
        check_family(render, TOKENS)
    check_family(render, {**TOKENS, mark: 11})


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS_CHAT_TEMPLATE, VICUNA, None])
def test_templates_of_the_model_itself_pass(template: str | None) -> None:
    render = renderer(template, {})
    check_renders(render)
    check_family(render, TOKENS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "cannot take a question: .*Remove it to use"),
        ("{{ raise_exception('no') }}", "refuses these messages: no. Remove it to use"),
        ("{{ messages[0].role }}", "leaves out the question. Remove it"),
        ("{{ unknown.thing.other }}", "cannot take a question"),
        ("{% for x in range(9999) %}{% for y in range(9999) %}z{% endfor %}{% endfor %}", "broken or hostile"),
    ],
)
def test_template_that_makes_no_prompt_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_renders(renderer(template, {}))
    assert "\n" not in str(caught.value)
    check_family(renderer(template, {}), TOKENS)  # left to `check_renders`


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "<|im_end|>"),
        (CHAT_TEMPLATE, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.content }} \n<|im_end|>{% endfor %}", "<|im_end|>"),
        (VICUNA, None),
        ("{{ messages[0].content }}", None),
        ("{{ messages[0].content + 1 }}", None),
        ("{% for m in messages %}{{ m.content }}<|im_end{% endfor %}", None),
    ],
)
def test_end_of_a_turn_is_the_token_after_an_answer(template: str | None, end: str | None) -> None:
    render = renderer(template, {"eos_token": "<|endoftext|>"})
    assert turn_end(render, TOKENS) == (None if end is None else TOKENS[end])


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (None, True),
        (CHAT_TEMPLATE, True),
        (CHAT_TEMPLATE.replace("add_generation_prompt", "false"), False),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", False),
        (VICUNA, True),
        ("{{ messages[0].content + 1 }}", True),
    ],
)
def test_template_that_ends_with_the_question_is_noticed(template: str | None, begins: bool) -> None:
    assert begins_answer(renderer(template, {})) == begins


def test_longest_token_that_fits_ends_a_turn() -> None:
    render = renderer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", {})
    assert turn_end(render, {"<|im_": 1, **TOKENS}) == TOKENS["<|im_end|>"]


@pytest.mark.parametrize(
    ("own", "settings", "expected"),
    [
        ("file", {"chat_template": "setting"}, "file"),
        (None, {"chat_template": "setting"}, "setting"),
        (None, {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        (None, {}, None),
    ],
)
def test_template_is_found_in_its_places(own: str | None, settings: dict[str, Any], expected: str | None) -> None:
    assert template_text(own, settings) == expected


@pytest.mark.parametrize("template", [[{"name": "rag", "template": "t"}], 7])
def test_malformed_settings_are_refused(template: object) -> None:
    with pytest.raises(ConfigError, match="chat template named 'default'|chat_template must be a string"):
        template_text(None, {"chat_template": template})


def test_special_tokens_are_strings_or_objects() -> None:
    settings = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "b", "unk_token": None}
    found = [special_token_text(settings, name) for name in ("eos_token", "bos_token", "unk_token", "pad_token")]
    assert found == ["<|im_end|>", "b", None, None]


def test_training_prompt_ends_before_or_after_the_answers_start() -> None:
    messages = [{"role": "user", "content": "Q"}]
    whole = training_prompt(messages)
    assert whole == training_prompt(messages, add_generation_prompt=False) + "<|im_start|>assistant\n"
