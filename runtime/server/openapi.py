"""The OpenAPI document of the server, made from the models that validate its requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..._version import __version__
from .protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"

EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
"""The schema of each event of a stream."""

REFUSALS = {
    400: "A field is wrong, or the prompt does not fit.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "There is nothing at this path, or the model is another one.",
    405: "The path takes other methods.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait.",
    500: "The model could not answer.",
    503: "The server is stopping.",
    504: "The answer took too long.",
}
"""The statuses of errors. All of them have the same body."""

EVERYWHERE = (401, 403, 405)
ANSWERING = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)

MODELS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    ChatCompletion,
    ChatChunk,
    CompletionRequest,
    Completion,
    ModelCard,
    ModelList,
    Health,
    ErrorBody,
)


def document(needs_key: bool) -> dict[str, Any]:
    """Returns the document. `needs_key` says whether the server asks for an API key."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    root: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "fastvlm",
            "version": __version__,
            "description": "Answers about images. A subset of OpenAI's API.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _answering(
                    "createChatCompletion", "Answer a conversation.", ChatRequest, ChatCompletion, ChatChunk
                )
            },
            "/v1/completions": {
                "post": _answering("createCompletion", "Continue a text.", CompletionRequest, Completion, Completion)
            },
            "/v1/models": {"get": _reading("listModels", "List the served model.", JSON, _schema(ModelList))},
            "/v1/models/{model}": {
                "get": {
                    **_reading("retrieveModel", "Describe the served model.", JSON, _schema(ModelCard), 404),
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ],
                }
            },
            "/health": {
                "get": {
                    **_reading("health", "Report the state of the server.", JSON, _schema(Health), 503),
                    "security": [],
                }
            },
            "/metrics": {"get": _reading("metrics", "Report metrics for Prometheus.", TEXT, {"type": "string"})},
            "/openapi.json": {"get": _reading("openapi", "Return this document.", JSON, {"type": "object"})},
        },
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        root["security"] = [{"key": []}]
    return root


def _schema(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _refusals(*statuses: int) -> dict[str, Any]:
    content = {JSON: {"schema": _schema(ErrorBody)}}
    return {str(status): {"description": REFUSALS[status], "content": content} for status in sorted(set(statuses))}


def _reading(name: str, summary: str, media_type: str, schema: dict[str, Any], *statuses: int) -> dict[str, Any]:
    success = {"description": "Success.", "content": {media_type: {"schema": schema}}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": success, **_refusals(*EVERYWHERE, *statuses)},
    }


def _answering(
    name: str, summary: str, body: type[BaseModel], whole: type[BaseModel], event: type[BaseModel]
) -> dict[str, Any]:
    success = {
        "description": f"The answer. With `stream`, events whose data is a `{event.__name__}`, and then `[DONE]`.",
        "content": {JSON: {"schema": _schema(whole)}, EVENTS: {"schema": EVENT}},
    }
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": _schema(body)}}},
        "responses": {"200": success, **_refusals(*ANSWERING)},
    }
