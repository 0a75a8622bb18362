"""Conversations: the history is kept, not read again, and answers are those of a fresh run over all of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm.models._mlx import mx
from fastvlm.models.errors import ImageError, PromptError, UsageError
from fastvlm.models.images import open_image, preprocess, to_pixel_values
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime.conversation import Conversation
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.prompt import Message
from fastvlm.runtime.prompt_cache import ImageItem

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float32_decoder")]

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE

Open = Callable[..., FastVLM]
Write = Callable[..., Path]


def fresh_answer(vlm: FastVLM, chat: Conversation, question: str, image: object, count: int) -> list[int]:
    """The likeliest ids after the whole history and a question, in one pass over all cells per id."""
    before = chat.messages
    asked = Message("user", question, 0 if image is None else 1)
    prompt = vlm.engine.prompts.encode([*before, asked])
    squares = [picture.pixels for picture in chat._images]
    if image is not None:
        squares.append(square(vlm, image))
    projector = vlm.engine.language.multi_modal_projector
    features = iter(projector(mx.array(vlm.engine.encoder.encode(to_pixel_values(pixels)))) for pixels in squares)
    decoder, answer = vlm.engine.language.language_model, []
    parts = [
        next(features) if n in prompt.places else decoder.embed(mx.array([[token_id]]))
        for n, token_id in enumerate(prompt.ids)
    ]
    x = mx.concatenate(parts, axis=1)
    for _ in range(count):
        answer.append(mx.argmax(decoder(x)[0, -1]).item())
        x = mx.concatenate([x, decoder.embed(mx.array([[answer[-1]]]))], axis=1)
    return answer


def square(vlm: FastVLM, image: Any) -> np.ndarray:
    return preprocess(open_image(image), vlm.config.image_size, "pad")


turns = st.lists(
    st.tuples(st.text("abc é?<", max_size=6), st.sampled_from([None, None, PICTURE, OTHER]), st.integers(1, 5)),
    min_size=1,
    max_size=4,
)


@given(turns=turns, system=st.sampled_from([None, "", "Be brief."]))
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_a_fresh_run_over_the_history(
    vlm: FastVLM, turns: list[tuple[str, Any, int]], system: str | None
) -> None:
    chat = vlm.chat(system=system)
    for question, image, count in turns:
        expected = fresh_answer(vlm, chat, question, image, count)
        found = chat.ask(question, image, max_tokens=count, ignore_eos=True)
        assert list(found.token_ids) == expected
        assert chat.messages[-1].ids == found.token_ids


def test_second_question_reads_its_own_tokens_alone(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = engine_module.prefill
    monkeypatch.setattr(engine_module, "prefill", lambda d, x, c: read.append(x.shape[1]) or original(d, x, c))
    chat = vlm.chat(PICTURE)
    first = chat.ask("What is it?", max_tokens=5, ignore_eos=True)
    calls = len(vlm.engine.encoder.calls)
    second = chat.ask("Why?", max_tokens=5)
    own = second.prompt_tokens - first.prompt_tokens - 5
    assert own < 40
    assert read[1] == own + 1  # and the last token of the answer, which nothing followed
    assert second.timings.reused_tokens == first.prompt_tokens + 4
    assert len(vlm.engine.encoder.calls) == calls


def test_image_added_later_stands_where_it_was_added(vlm: FastVLM) -> None:
    chat = vlm.chat(PICTURE)
    chat.ask("One?", max_tokens=3, ignore_eos=True)
    before = chat.ask("Two?", max_tokens=3, ignore_eos=True).prompt_tokens
    chat.add_image(OTHER)
    third = chat.ask("Three?", max_tokens=3, ignore_eos=True)
    fourth = chat.ask("Four?", max_tokens=1)
    assert (third.prompt_tokens - before) - (fourth.prompt_tokens - third.prompt_tokens) > 10  # 17 for the picture
    assert [message.image_count for message in chat.messages if message.role == "user"] == [1, 0, 1, 0]
    assert list(chat._images) == [ImageItem(square(vlm, image)) for image in (PICTURE, OTHER)]


@pytest.mark.parametrize("pieces", [0, 1, 3])
@pytest.mark.parametrize("how", ["close", "drop", "ask"])
def test_question_that_is_cancelled_was_not_asked(vlm: FastVLM, pieces: int, how: str) -> None:
    options = {"max_tokens": 6, "ignore_eos": True}
    usual, chat = vlm.chat(PICTURE), vlm.chat(PICTURE)
    for conversation in (usual, chat):
        conversation.ask("What is it?", **options)
    stream = chat.stream("Tell me much more about it.", OTHER, **options)
    for _ in range(pieces):
        next(stream)
    if how == "close":
        stream.close()
    elif how == "drop":
        del stream
        gc.collect()
    found = chat.ask("Why?", **options)
    assert found.token_ids == usual.ask("Why?", **options).token_ids
    assert chat.messages == usual.messages
    if how != "drop":
        assert list(stream) == []
        with pytest.raises(UsageError, match="not complete"):
            _ = stream.generation


def test_error_on_the_way_costs_nothing_but_time(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_tokens": 4, "ignore_eos": True}
    usual, chat = vlm.chat(PICTURE), vlm.chat(PICTURE)
    for conversation in (usual, chat):
        conversation.ask("What is it?", **options)
    decoder = type(vlm.engine.language.language_model)
    original, calls = decoder.__call__, iter(range(100))

    def failing(self: object, *args: object, **named: object) -> mx.array:
        logits = original(self, *args, **named)
        if next(calls) == 1:  # the second token of the answer
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("More?", **options)
    found = chat.ask("Why?", **options)
    assert found.token_ids == usual.ask("Why?", **options).token_ids
    assert found.timings.reused_tokens < 30  # all was read again, but for the beginning of every prompt


def test_full_context_ends_an_answer_and_refuses_the_next(write_folder: Write, open_vlm: Open) -> None:
    vlm = open_vlm(write_folder(tokenizer_model_max_length=80))
    chat = vlm.chat(PICTURE)
    first = chat.ask("What?", max_tokens=1000, ignore_eos=True)
    assert first.finish_reason == "context"
    assert first.prompt_tokens + len(first.token_ids) == 80
    messages = chat.messages
    with pytest.raises(PromptError, match="the context has 80 .* start a new chat"):
        chat.ask("And?")
    assert chat.messages == messages
    chat.reset()
    assert chat.ask("What?", PICTURE, max_tokens=1000, ignore_eos=True).token_ids == first.token_ids


def test_reset_keeps_the_system_prompt_alone(vlm: FastVLM) -> None:
    chat = vlm.chat(PICTURE, system="Be brief.")
    first = chat.ask("What?", max_tokens=3, ignore_eos=True)
    chat.reset()
    assert chat.messages == (Message("system", "Be brief."),)
    again = chat.ask("What?", PICTURE, max_tokens=3, ignore_eos=True)
    assert (again.token_ids, again.prompt_tokens) == (first.token_ids, first.prompt_tokens)


def test_history_is_read_again_when_the_template_rewrites_it(write_folder: Write, open_vlm: Open) -> None:
    path = write_folder(manifest=None)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}<|im_start|>{{ m.content }}"
        "{% else %}{{ loop.length }}{{ m.content }}{% endif %}{% endfor %}<|im_end|>"
    )
    vlm = open_vlm(path)
    chat = vlm.chat()
    for question in ("One", "Two", "Three"):
        expected = fresh_answer(vlm, chat, question, None, 4)
        assert list(chat.ask(question, max_tokens=4, ignore_eos=True).token_ids) == expected


def test_error_when_a_question_has_a_system_prompt(vlm: FastVLM) -> None:
    with pytest.raises(TypeError, match="system"):
        vlm.chat().ask("Hi", system="Be brief.")
    with pytest.raises(UsageError, match="system must be a string"):
        vlm.chat(system=3)  # type: ignore[arg-type]


def test_image_error_leaves_the_conversation_as_it_was(vlm: FastVLM, tmp_path: Path) -> None:
    chat = vlm.chat(PICTURE)
    with pytest.raises(ImageError):
        chat.add_image(tmp_path / "gone.png")
    with pytest.raises(ImageError):
        chat.stream("Hi", tmp_path / "gone.png")
    assert chat.ask("Hi", max_tokens=1).prompt_tokens == vlm.generate(PICTURE, "Hi", max_tokens=1).prompt_tokens


def test_same_picture_is_known_by_its_pixels() -> None:
    assert ImageItem(PICTURE) == ImageItem(PICTURE.copy())
    assert ImageItem(PICTURE) != ImageItem(OTHER)
    assert ImageItem(PICTURE) != 3


def test_system_prompt_that_is_no_unicode_is_told_at_once(vlm: FastVLM) -> None:
    with pytest.raises(PromptError, match="the system prompt is not valid Unicode at character 3"):
        vlm.chat(system="caf\udce9")


@pytest.mark.parametrize("background", ["white", "none"])
@pytest.mark.parametrize("method", ["ask", "stream"])
def test_image_of_a_question_has_the_background_of_the_chat(vlm: FastVLM, method: str, background: str) -> None:
    picture = Image.new("RGBA", (60, 60), (200, 0, 0, 0))
    chat = vlm.chat(background=background)
    answer = getattr(chat, method)("Hi", picture, max_tokens=1)
    _ = answer if method == "ask" else answer.read()
    (kept,) = chat._images
    assert (kept.pixels == square(vlm, open_image(picture, background=background))).all()
