"""The OpenAPI document says what the server does."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from fastvlm.runtime.server import openapi
from fastvlm.runtime.server.run import Server

from .conftest import CHAT, question


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_every_route_is_documented(server: Server) -> None:
    paths = {route.path.replace(":path", "") for route in server.service.routes() if isinstance(route, Route)}
    assert set(openapi.document(False)["paths"]) == paths - {"/"}


def test_references_are_defined(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    names = {name.removeprefix("#/components/schemas/") for name in references(document)}
    assert names <= set(document["components"]["schemas"])


def test_key_is_documented_where_it_is_asked_for() -> None:
    assert "security" not in openapi.document(False)
    document = openapi.document(True)
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/models/model", "/health"])
def test_responses_follow_their_schema(client: httpx.Client, path: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = client.get("/openapi.json").json()
    response = client.post(path, json=question()) if path == CHAT else client.get(path)
    method = "post" if path == CHAT else "get"
    described = document["paths"][path.replace("models/model", "models/{model}")][method]["responses"]["200"]
    schema = described["content"]["application/json"]["schema"]
    jsonschema.validate(response.json(), {**schema, "components": document["components"]})
