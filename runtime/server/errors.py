"""Errors as clients see them: a status, and a body in OpenAI's form.

An error that a client can correct has its reason. Others have it in the log alone, since they may name files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from starlette.responses import Response

from ...models.errors import (
    CancelledError,
    FastVLMError,
    ImageError,
    PromptError,
    QueueFullError,
    UnavailableError,
    UsageError,
)
from .protocol import ErrorBody, ErrorDetail

log = logging.getLogger("fastvlm.server")

MAX_SHOWN = 60
"""The most characters of a client's value in a message."""

RETRY_SECONDS = "1"
"""The value of `Retry-After`: an answer takes about that long."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""OpenAI's type of an error by its status. Others are `invalid_request_error`."""


PARAMETERS = {"schema": "response_format"}
"""The field of a request that sets a Python argument, where it has another name."""


class ApiError(Exception):
    """An error for a client.

    Attributes:
        status: the HTTP status.
        param: the field of the request that is wrong.
        code: a short name that programs can compare.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", RETRY_SECONDS)

    def body(self) -> ErrorBody:
        """Returns the error in OpenAI's form."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return ErrorBody(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        """Returns the whole response."""
        content = self.body().model_dump_json()
        return Response(content, self.status, headers=self.headers, media_type="application/json")


def from_library(error: FastVLMError) -> ApiError:
    """Returns an error of the library for a client. One that no request can cause alone is logged."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UnavailableError | CancelledError):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), param="messages", code="invalid_image")
    if isinstance(error, PromptError):
        code = "context_length_exceeded" if "context" in str(error) else "invalid_prompt"
        return ApiError(400, str(error), param="messages", code=code)
    if isinstance(error, UsageError):
        argument = error.arguments[0] if error.arguments else None
        return ApiError(400, str(error), param=PARAMETERS.get(argument or "", argument), code="invalid_value")
    log.error("an answer failed: %s", error)
    return ApiError(500, "the model could not answer. The server's log has the reason.", code="model_error")


def from_validation(error: pydantic.ValidationError, document: object) -> ApiError:
    """Returns the deepest fault that validation found in a request's JSON `document`, with the field's place in it.

    For a field of several types each type has its faults, and the deepest belongs to the one that was meant.
    """
    first = max(error.errors(include_url=False, include_context=False), key=lambda fault: len(fault["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body must be JSON ({first['msg'].removeprefix('Invalid JSON: ')})", code="invalid_json"
        )
    param = place(first["loc"], document, missing=first["type"] == "missing")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is not a parameter of this server. Leave it out.", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing. Add it.", param=param, code="missing_parameter")
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(
        400, f"{param or 'the body'}: {reason} (got {shown(first['input'])})", param=param or None, code="invalid_value"
    )


def place(location: Sequence[int | str], document: object, missing: bool = False) -> str:
    """Returns the place of a field, such as `messages[0].content[1].text`.

    pydantic adds the names of a union's members to the location. They are left out, because the document lacks them.
    """
    parts: list[str] = []
    here: Any = document
    for n, part in enumerate(location):
        last = n == len(location) - 1
        if isinstance(part, int):
            if isinstance(here, list) and part < len(here):
                parts.append(f"[{part}]")
                here = here[part]
        elif isinstance(here, dict) and (part in here or (last and missing)):
            parts.append(f".{part}")
            here = here.get(part)
    return "".join(parts).removeprefix(".")


def shown(value: object) -> str:
    """Returns a client's value for a message, in JSON and shortened."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value[: 2 * MAX_SHOWN] if isinstance(value, str) else value, default=repr)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
