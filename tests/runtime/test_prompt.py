"""Prompts: the template's text is kept apart from the users' text, and images are put in their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import ConfigError, PromptError
from fastvlm.models.tokenizer_files import CHAT_TEMPLATE, added_token
from fastvlm.runtime.prompt import Message, Prompt, PromptEncoder
from fastvlm.runtime.tokenizer import Tokenizer

IMAGE = 1023
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "\ue0000\ue001", "<|im_", "end|>")
TRAINING_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)

fixtures_are_constant = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
Write = Callable[..., Path]


def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder(folder, Tokenizer(folder), IMAGE)


def joint(folder: Path, text: str) -> list[int]:
    """Returns the library's ids of the whole text, with its control tokens."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def ask(folder: Path, text: str, images: int = 0) -> list[int]:
    return list(encoder(folder).encode([Message("user", text, images)]).ids)


@pytest.mark.parametrize("name", ["llava_small_reparam_tied", "llava_small_train_untied"])
@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("template", ["theirs", "ours"])
def test_ids_equal_the_reference(golden: Path, tmp_path: Path, name: str, case: int, template: str) -> None:
    expected = json.loads((golden / name / "expected.json").read_text())["cases"][case]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if template == "theirs" or file == "tokenizer.json":
            (tmp_path / file).write_bytes((golden / name / file).read_bytes())
    prompts = PromptEncoder(tmp_path, Tokenizer(tmp_path), -200)
    found = prompts.encode([Message("user", expected["prompt"], int(expected["image"] is not None))])
    assert list(found.ids) == expected["prompt_ids"]


@pytest.mark.slow
@fixtures_are_constant
@given(text=st.text(alphabet=st.characters(exclude_characters="<\ue000\ue001", codec="utf-8")))
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["folder", "built-in"])
def test_ids_equal_the_librarys_for_text_without_controls(
    write_tokenizer: Write, template: str | None, text: str
) -> None:
    folder = write_tokenizer(chat_template=template)
    assert ask(folder, text) == joint(folder, TRAINING_PROMPT.format(text))
    assert ask(folder, text, images=1) == joint(folder, TRAINING_PROMPT.format("<image>\n" + text))


@pytest.mark.slow
@fixtures_are_constant
@given(text=st.lists(st.one_of(st.text(max_size=5), st.sampled_from(CONTROLS))).map("".join))
def test_users_text_adds_no_control_token(write_tokenizer: Write, text: str) -> None:
    folder = write_tokenizer()
    controls = set(Tokenizer(folder).control_tokens.values())
    asked, empty = ([i for i in ask(folder, words) if i in controls] for words in (text.replace("<image>", ""), ""))
    assert asked == empty


def test_system_prompt_is_text_and_holds_no_image(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    messages = [Message("system", "Be brief.<|im_end|><image>"), Message("user", "Hi")]
    ids = list(encoder(folder).encode(messages).ids)
    controls = Tokenizer(folder).control_tokens
    assert ids.count(controls["<|im_end|>"]) == 2
    assert IMAGE not in ids
    plain = encoder(folder).encode([Message("system", "Be brief."), Message("user", "Hi")])
    whole = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert list(plain.ids) == joint(folder, whole)


def test_turns_follow_one_another(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    messages = [Message("user", "One?", 1), Message("assistant", "Two <image>."), Message("user", "And?<image>", 1)]
    prompt = encoder(folder).encode(messages)
    assert prompt.image_count == 2
    first = encoder(folder).encode(messages[:1])
    assert prompt.ids[: len(first.ids)] == first.ids  # so that a conversation can keep its cache


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("Look.", 0, "Look."),
        ("Look.", 1, "<image>\nLook."),
        ("Look.", 2, "<image>\n<image>\nLook."),
        ("This <image> and <image>.", 2, "This <image> and <image>."),
        ("<image>", 1, "<image>"),
        ("<image><image>x", 2, "<image><image>x"),
        ("", 1, "<image>\n"),
    ],
)
def test_images_take_their_places(write_tokenizer: Write, text: str, images: int, expected: str) -> None:
    folder = write_tokenizer()
    assert ask(folder, text, images) == joint(folder, TRAINING_PROMPT.format(expected))


@pytest.mark.parametrize(("text", "images"), [("<image>", 0), ("<image> <image>", 1), ("<image>", 3)])
def test_prompt_error_names_the_numbers_of_images_and_marks(write_tokenizer: Write, text: str, images: int) -> None:
    with pytest.raises(PromptError, match=rf"\(got <image>: {text.count('<image>')}, images: {images}\)"):
        ask(write_tokenizer(), text, images)


def test_images_are_counted_by_their_places() -> None:
    prompt = Prompt((1, 2, -200, 3, -200, -200), -200, frozenset({2, 4}))
    assert prompt.image_count == 2  # the last -200 is an answer's
    assert prompt.token_count(16) == 4 + 2 * 16


def test_answer_in_the_history_keeps_its_ids(write_tokenizer: Write) -> None:
    tokenizer = Tokenizer(write_tokenizer())
    prompts = PromptEncoder(write_tokenizer(), tokenizer, 1023)
    text = "one two"
    usual = prompts.encode([Message("user", "Hi", 1), Message("assistant", text), Message("user", "Why?")])
    letters = tuple(tokenizer.encode(letter)[0] for letter in text)
    assert len(letters) > len(tokenizer.encode(text))
    answer = (*letters, 1023)
    kept = prompts.encode([Message("user", "Hi", 1), Message("assistant", "", ids=answer), Message("user", "Why?")])
    begin = next(n for n in range(len(kept.ids)) if kept.ids[n : n + len(answer)] == answer)
    end = len(kept.ids) - begin - len(answer)
    assert kept.ids[:begin] == usual.ids[:begin]
    assert kept.ids[-end:] == usual.ids[-end:]
    assert kept.image_count == usual.image_count == 1


@pytest.mark.parametrize("place", ["settings", "named", "file", "file before settings"])
def test_template_is_found_where_the_folder_keeps_it(write_tokenizer: Write, place: str) -> None:
    template = "{{ '<|im_start|>' }}Q: {{ messages[0]['content'] }}{% if add_generation_prompt %}\nA:{% endif %}"
    named = [{"name": "tools", "template": "wrong"}, {"name": "default", "template": template}]
    chosen = {"settings": template, "named": named, "file": None, "file before settings": "wrong"}[place]
    folder = write_tokenizer(chat_template=chosen)
    if "file" in place:
        (folder / "chat_template.jinja").write_text(template)
    assert ask(folder, "why") == joint(folder, "<|im_start|>Q: whyA:")  # the line break after a block goes


def test_template_is_rendered_as_hugging_face_does(write_tokenizer: Write) -> None:
    template = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "    {% if message.role == 'user' %}\n"
        "{{ message.content }}{{ eos_token }}{{ ['é'] | tojson }}{{ strftime_now('%Y')[:2] }}\n"
        "    {% endif %}\n"
        "{%- endfor %}"
    )
    folder = write_tokenizer(chat_template=template)
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template(
        [[{"role": "user", "content": "why"}]], chat_template=template, eos_token="<|im_end|>"
    )
    assert ask(folder, "why") == joint(folder, theirs[0])


def test_control_tokens_strip_blanks_by_their_flags(write_tokenizer: Write) -> None:
    folder = write_tokenizer(chat_template="<|im_start|>  {{ messages[0].content }} \n <|im_end|> x")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"], token["lstrip"] = token["content"] == "<|im_start|>", token["content"] == "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert ask(folder, "why") == joint(folder, "<|im_start|>  why \n <|im_end|> x")


def test_longer_control_token_wins_when_one_begins_another(write_tokenizer: Write) -> None:
    folder = write_tokenizer(chat_template="<|im_start|>x{{ messages[0].content }}<|im_end|><|im")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(added_token(1024, "<|im"))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert ask(folder, "why") == joint(folder, "<|im_start|>xwhy<|im_end|><|im")
    assert ask(folder, "why")[-1] == 1024


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "malformed at line 1"),
        ([{"name": "tools", "template": "x"}], r"named 'default' \(got \['tools'\]\)"),
        (7, r"must be a string \(got 7\)"),
    ],
)
def test_config_error_when_a_template_is_malformed(write_tokenizer: Write, template: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(write_tokenizer(chat_template=template))


def test_config_error_when_the_template_file_is_not_utf8(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja cannot be read"):
        encoder(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no images') }}", "refuses these messages: no images"),
        ("{{ messages[9].content }}", "cannot take these messages"),
        ("{{ messages[0].content.missing() }}", "which is not allowed"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "cannot take these messages"),
        ("{{ messages.append(1) }}", "which is not allowed"),
        ("hello", "leaves out the user message"),
        ("{{ messages[0].content | length }}", "leaves out the user message"),
        ("{{ messages[0].content }}\ue0007\ue001", "private-use characters"),
    ],
)
def test_prompt_error_when_a_template_fails(write_tokenizer: Write, template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ask(write_tokenizer(chat_template=template), "why")


def test_template_of_another_family_is_refused(write_tokenizer: Write) -> None:
    gemma = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    with pytest.raises(ConfigError, match="the chat template is that of Gemma: it writes <start_of_turn>"):
        encoder(write_tokenizer(chat_template=gemma))


def test_turn_ends_with_the_templates_own_token(write_tokenizer: Write) -> None:
    folder = write_tokenizer(chat_template="{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    assert encoder(folder).turn_end_id == Tokenizer(folder).control_tokens["<|endoftext|>"]
    assert encoder(write_tokenizer(chat_template=None)).turn_end_id == Tokenizer(folder).control_tokens["<|im_end|>"]


def test_template_file_may_have_a_byte_order_mark(write_tokenizer: Write) -> None:
    folder = write_tokenizer(chat_template=None)
    expected = ask(folder, "Hi")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8-sig")
    assert ask(folder, "Hi") == expected
