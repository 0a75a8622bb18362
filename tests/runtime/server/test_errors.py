"""Errors in OpenAI's form."""

from __future__ import annotations

import json

import pydantic
import pytest

from fastvlm.models.errors import (
    FastVLMError,
    ImageError,
    PackageError,
    PromptError,
    QueueFullError,
    UnavailableError,
    UsageError,
)
from fastvlm.runtime.server.errors import ApiError, from_library, from_validation, place, shown
from fastvlm.runtime.server.protocol import ChatRequest, ErrorBody


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (QueueFullError("64 requests wait"), 429, "rate_limit_error", "queue_full"),
        (UnavailableError("the scheduler is closed"), 503, "server_error", "unavailable"),
        (ImageError("the image has 0 bytes"), 400, "invalid_request_error", "invalid_image"),
        (PromptError("the context has 8 tokens"), 400, "invalid_request_error", "context_length_exceeded"),
        (PromptError("the prompt is empty"), 400, "invalid_request_error", "invalid_prompt"),
        (UsageError("top_p must be", "top_p"), 400, "invalid_request_error", "invalid_value"),
        (PackageError("/home/me/model is damaged"), 500, "server_error", "model_error"),
        (FastVLMError("anything"), 500, "server_error", "model_error"),
    ],
)
def test_library_error_has_its_status(error: FastVLMError, status: int, kind: str, code: str) -> None:
    made = from_library(error)
    detail = made.body().error
    assert (made.status, detail.type, detail.code) == (status, kind, code)
    assert (str(error) in detail.message) == (status != 500)


def test_response_has_the_form_of_openai() -> None:
    response = ApiError(429, "full", code="queue_full").response()
    assert response.headers["retry-after"] == "1"
    assert ErrorBody.model_validate_json(bytes(response.body)).error.message == "full"


def test_deepest_fault_is_reported_at_its_place() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}], "extra": 1}
    with pytest.raises(pydantic.ValidationError) as raised:
        ChatRequest.model_validate_json(json.dumps(body))
    error = from_validation(raised.value, body)
    assert error.param == "messages[0].content[0].image_url.url"
    assert "(got 5)" in str(error)


def test_place_leaves_out_the_members_of_unions() -> None:
    document = {"messages": [{"role": "user", "content": [{"type": "text"}]}]}
    location = ("messages", 0, "user", "content", "list[union]", 0, "text", "text")
    assert place(location, document, missing=True) == "messages[0].content[0].text"
    assert place(("prompt",), {}, missing=True) == "prompt"
    assert place((), None) == ""


def test_shown_values_are_short() -> None:
    assert shown("x" * 10**6).endswith("…")
    assert len(shown("x" * 10**6)) < 70
    assert shown([1] * 10**6) == "a list of 1,000,000"
    assert shown({"a": 1}) == "an object of 1"
    assert shown(None) == "null"
