"""The messages of the protocol take what OpenAI's clients send, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from fastvlm.runtime.server.protocol import ChatRequest, CompletionRequest, Timings
from fastvlm.runtime.timings import TTFT_STAGES
from fastvlm.runtime.timings import Timings as EngineTimings

HELLO = [{"role": "user", "content": "Hello"}]


def valid(kind: type[pydantic.BaseModel], **fields: Any) -> bool:
    try:
        kind.model_validate_json(json.dumps(fields))
    except pydantic.ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "store": False},
        {"temperature": 0, "top_p": 1, "seed": -5, "stop": None, "max_completion_tokens": 5, "modalities": ["text"]},
        {
            "stop": ["a", "b"],
            "tools": [],
            "tool_choice": "none",
            "logprobs": True,
            "top_logprobs": 20,
            "metadata": {"a": "b"},
        },
        {"response_format": {"type": "text"}, "stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_usual_fields_are_accepted(fields: dict[str, Any]) -> None:
    assert valid(ChatRequest, messages=HELLO, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"presence_penalty": 0.1},
        {"logit_bias": {"5": 1}},
        {"tools": [{"type": "function"}]},
        {"logprobs": 1},
        {"top_logprobs": 21},
        {"modalities": ["audio"]},
        {"temperature": "0"},
        {"temperature": True},
        {"stop": ""},
        {"stop": ["x"] * 17},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"seed": 2**63},
        {"unknown": None},
    ],
)
def test_fields_that_would_change_the_answer_are_refused(fields: dict[str, Any]) -> None:
    assert not valid(ChatRequest, messages=HELLO, **fields)


def test_message_of_an_earlier_answer_is_accepted() -> None:
    empty = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls"))
    answer = {"role": "assistant", "content": "Hi", **empty, "annotations": []}
    assert valid(ChatRequest, messages=[*HELLO, answer, *HELLO])
    assert not valid(ChatRequest, messages=[*HELLO, {**answer, "tool_calls": [{}]}])


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_send_images(role: str) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    assert valid(ChatRequest, messages=[{"role": "user", "content": [part]}])
    assert not valid(ChatRequest, messages=[{"role": role, "content": [part]}])


def test_fields_of_the_other_part_are_null() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    words = {"type": "text", "text": "What?"}
    for part, name, value in ((words, "image_url", image["image_url"]), (image, "text", "What?")):
        assert valid(ChatRequest, messages=[{"role": "user", "content": [{**part, name: None}]}])
        assert not valid(ChatRequest, messages=[{"role": "user", "content": [{**part, name: value}]}])


@pytest.mark.parametrize(("prompt", "right"), [("a", True), (["a"], True), ([5, 6], True), (["a", "b"], False),
                                               ([], False), ([-1], False), (5, False)])  # fmt: skip
def test_completion_takes_one_prompt(prompt: object, right: bool) -> None:
    assert valid(CompletionRequest, prompt=prompt) == right


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        CompletionRequest.model_validate_json(f'{{"prompt": "a", "temperature": {number}}}')


def test_timings_have_the_fields_of_the_engine() -> None:
    stages = dict.fromkeys((*TTFT_STAGES, "load_ms", "image_open_ms", "compile_ms"), 1.0)
    timings = EngineTimings(**stages, decode_tps=None, prompt_tokens=1, generated_tokens=1, cold=False)
    made = Timings(queue_ms=1.0, **timings.as_dict())
    assert made.model_dump(exclude={"queue_ms"}) == timings.as_dict()
