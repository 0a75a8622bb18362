"""Requests that may not use the server are refused before their body is read."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.runtime.server.run import Server

from .conftest import CHAT, question

Start = Callable[..., AbstractContextManager[Server]]
KEY = "a key for tests"


@pytest.fixture(scope="module")
def locked(start_server: Start) -> Iterator[httpx.Client]:
    """A client of a server with a key, and with one page that may use it."""
    with (
        start_server(api_key=KEY, allow_origin=("https://page.example",)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        yield client


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "", "localhost@evil.example", "a,b"])
def test_foreign_host_header_is_refused(client: httpx.Client, name: str) -> None:
    response = client.post(CHAT, json=question(), headers={"Host": name})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


def test_own_host_header_is_accepted(client: httpx.Client) -> None:
    for name in ("localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080"):
        assert client.get("/health", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "https://page.example.evil"])
def test_other_pages_are_refused(locked: httpx.Client, origin: str) -> None:
    headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
    response = locked.post(CHAT, json=question(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


def test_own_and_allowed_pages_are_accepted(locked: httpx.Client) -> None:
    own = str(locked.base_url).rstrip("/")
    assert locked.get("/health", headers={"Origin": own}).status_code == 200
    response = locked.get("/health", headers={"Origin": "https://page.example"})
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    asked = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os",
    }
    preflight = locked.options(CHAT, headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff"]
)
def test_wrong_key_is_refused(locked: httpx.Client, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        response = locked.get(path, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_right_key_is_accepted(locked: httpx.Client) -> None:
    assert locked.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    assert locked.get("/health").status_code == 200


@given(key=st.text(string.ascii_letters + string.punctuation, min_size=1, max_size=20))
@settings(max_examples=30)
def test_no_other_key_opens(locked: httpx.Client, key: str) -> None:
    assert locked.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401


def test_responses_are_not_framed_sniffed_or_cached(client: httpx.Client) -> None:
    for response in (client.get("/health"), client.get("/nothing"), client.get("/health", headers={"Host": "evil"})):
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers
