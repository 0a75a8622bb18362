"""From the protocol to the engine and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastvlm.models.errors import ImageError, UsageError
from fastvlm.runtime.batch import Piece
from fastvlm.runtime.beam_search import BeamOptions
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.logprobs import TokenLogprob
from fastvlm.runtime.prompt import RAW
from fastvlm.runtime.server.errors import ApiError
from fastvlm.runtime.server.images import ImageReader
from fastvlm.runtime.server.protocol import ChatRequest, CompletionRequest
from fastvlm.runtime.server.settings import Settings
from fastvlm.runtime.server.translate import Reply, Translated, chat_request, completion_request
from fastvlm.runtime.timings import Timings

from .conftest import data_url, png

IMAGE = {"type": "image_url", "image_url": {"url": data_url(png())}}
LIMITS = Settings(allow_grammar=True, max_tokens=100, max_images=3)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*messages: Any, **options: Any) -> Translated:
    sent = [message if isinstance(message, dict) else {"role": "user", "content": message} for message in messages]
    body = ChatRequest.model_validate_json(json.dumps({"messages": sent, **options}))
    return chat_request(body, LIMITS, ImageReader(LIMITS, 64), "pad", 50)


@pytest.mark.parametrize(
    ("parts", "content", "count"),
    [
        ([IMAGE, text("What?")], "What?", 1),
        ([text("What?"), IMAGE], "What?", 1),
        ([IMAGE, IMAGE, text("Which?"), text("Say.")], "Which?\nSay.", 2),
        ([IMAGE, text("or"), IMAGE, text("?")], "<image>\nor<image>\n?", 2),
        ([text("First"), IMAGE, text("then"), IMAGE], "First<image>\nthen<image>\n", 2),
        ([text("This <image> here"), IMAGE], "This <image> here", 1),
        ([IMAGE], "", 1),
        ([{**IMAGE, "text": None}, {**text("What?"), "image_url": None}], "What?", 1),  # rows of one table
    ],
)
def test_images_come_first_unless_text_separates_them(parts: list, content: str, count: int) -> None:
    (message,) = chat(parts).request.messages
    assert (message.content, message.image_count) == (content, count)


def test_roles_and_images_of_a_conversation_keep_their_order() -> None:
    request = chat(
        {"role": "developer", "content": "Be brief."},
        [IMAGE, text("What?")],
        {"role": "assistant", "content": [text("A cat.")]},
        "And?",
    ).request
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "user"]
    assert [message.image_count for message in request.messages] == [0, 1, 0, 0]
    assert [image.size for image in request.images] == [(64, 64)]


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 100), ({"max_tokens": 5}, 5), ({"max_tokens": 500}, 100), ({"max_tokens": 9, "max_completion_tokens": 7}, 7)],
)
def test_tokens_are_limited(options: dict[str, int], count: int) -> None:
    assert chat("Hi", **options).request.options.max_tokens == count


def test_options_reach_the_engine() -> None:
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 3}
    options = chat("Hi", **sent, stop="x").request.options
    assert {name: getattr(options.sampling, name) for name in sent} == sent
    assert options.stop == ("x",)
    assert chat("Hi", fit="crop").request.fit == "crop"


@pytest.mark.parametrize(
    ("form", "argument"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
            "schema",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"choice": ["yes", "no"]}, "choice"),
        ({"grammar": 'start: "a"'}, "grammar"),
    ],
)
def test_form_of_an_answer_reaches_the_engine(form: dict[str, Any], argument: str | None) -> None:
    constraint = chat("Hi", **form).request.options.constraint
    assert (constraint and constraint.argument) == argument


def test_two_forms_of_an_answer_are_refused() -> None:
    with pytest.raises(UsageError, match="one form"):
        chat("Hi", regex="a", response_format={"type": "json_object"})


def test_too_many_images_are_refused_before_they_are_read() -> None:
    bad = {"type": "image_url", "image_url": {"url": "data:nonsense"}}
    with pytest.raises(ApiError, match="at most 3 images"):
        chat([bad] * 4)
    with pytest.raises(ImageError):
        chat([bad])


def test_completion_is_raw() -> None:
    body = CompletionRequest(prompt="<|im_start|>")
    (message,) = completion_request(body, LIMITS, 10, 50).request.messages
    assert (message.role, message.content) == (RAW, "<|im_start|>")
    (message,) = completion_request(CompletionRequest(prompt=[1, 9]), LIMITS, 10, 50).request.messages
    assert message.ids == (1, 9)


def test_ids_past_the_vocabulary_are_refused() -> None:
    with pytest.raises(ApiError, match="below 10"):
        completion_request(CompletionRequest(prompt=[1, 10]), LIMITS, 10, 50)


def test_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    for refused in (
        lambda: chat("x" * 3201, "x" * 3200),
        lambda: completion_request(CompletionRequest(prompt="x" * 6401), LIMITS, 10, 50),
    ):
        with pytest.raises(ApiError, match="6,401 characters") as raised:
            refused()
        assert raised.value.code == "context_length_exceeded"
    assert chat("x" * 6400).request.messages


def test_beam_search_is_an_extension_without_a_stream() -> None:
    sent = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"}
    assert chat("Hi", **sent).request.options.beams == BeamOptions(3, 0.5, "never")
    assert chat("Hi").request.options.beams == BeamOptions()
    with pytest.raises(ApiError, match="whole answer"):
        chat("Hi", num_beams=2, stream=True)
    with pytest.raises(UsageError, match="num_beams above 1 cannot be combined with temperature"):
        chat("Hi", num_beams=2, temperature=1)


def test_offsets_of_completions_count_characters() -> None:
    """Tokens 0 and 1 are one character together, and a stream has them in two pieces."""
    tokens = ["é".encode()[:1], "é".encode()[1:], b"ab", b"!"]
    found = [TokenLogprob(n, -1.0, ((2, -0.5), (n, -1.0))) for n in range(4)]

    def reply() -> Reply:
        return Reply("model", False, False, lambda token_id: tokens[token_id], lambda: 0.0)

    timings = Timings(**dict.fromkeys(Timings.__dataclass_fields__, 1))
    whole = json.loads(reply().whole(Generation("éab!", (0, 1, 2, 3), timings, "length", 1, logprobs=tuple(found))))
    streamed = reply()
    sent = [streamed.events(Piece(part, (n,), (found[n],))) for n, part in enumerate(("", "é", "ab", "!"))]
    pieces = [json.loads(event)["choices"][0]["logprobs"] for (event,) in sent]
    assert (
        whole["choices"][0]["logprobs"]
        == {name: [piece[name][0] for piece in pieces] for name in pieces[0]}
        == {
            "tokens": [r"bytes:\xc3", r"bytes:\xa9", "ab", "!"],
            "token_logprobs": [-1.0] * 4,
            "top_logprobs": [
                {"ab": -0.5, r"bytes:\xc3": -1.0},
                {"ab": -0.5, r"bytes:\xa9": -1.0},
                {"ab": -0.5},
                {"ab": -0.5, "!": -1.0},
            ],
            "text_offset": [0, 0, 1, 3],
        }
    )
