"""The settings of a server."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.runtime.server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "mac-mini.local", "127.0.0.1.example.org"])
def test_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="needs api_key") as raised:
        Settings(host=host)
    assert raised.value.arguments == ("host", "api_key")
    assert not Settings(host=host, api_key="a key of length").is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert Settings(host=host).is_loopback


@pytest.mark.parametrize("key", ["", "short", "a key with\nnewline", "schlüssel-länger"])
def test_weak_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="printable ASCII") as raised:
        Settings(api_key=key)
    assert not key or key not in str(raised.value)
    assert "api_key=" not in repr(Settings(api_key="long enough"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"port": -1},
        {"batch_size": 0},
        {"max_queue": 0},
        {"max_tokens": 0},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"stop_timeout_s": float("inf")},
        {"allow_origin": ("example.org",)},
        {"allow_origin": ("https://example.org/path",)},
        {"allow_url": ("https://example.org",)},
        {"allow_host": ("a b",)},
    ],
)
def test_value_out_of_range_names_its_argument(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        Settings(**wrong)
    assert raised.value.arguments == tuple(wrong)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "10.0.0.1", "proxy.example.org"])
def test_own_names_and_addresses_are_accepted(name: str) -> None:
    assert Settings(allow_host=("proxy.example.org",)).accepts_host(name)


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "proxy"])
def test_rebound_names_are_not_accepted(name: str) -> None:
    assert not Settings(allow_host=("proxy.example.org",)).accepts_host(name)
    assert not Settings(host="0.0.0.0", api_key="long enough").accepts_host(name)
