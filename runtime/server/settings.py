"""The settings of a server: its address, who may use it, and the limits of a request. Checked before a model loads."""

from __future__ import annotations

import ipaddress
import math
import re
import socket
from dataclasses import dataclass, field

from ...models.errors import UsageError

MEBIBYTE = 2**20

MIN_KEY_CHARACTERS = 8
"""The shortest API key. A shorter one can be guessed over a network."""

ORIGIN = re.compile(r"https?://[^/\s?#@]+")
"""An origin as browsers send it: a scheme, a host and perhaps a port, without a path."""

HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}(?::[0-9]{1,5})?")
"""A host name or an IPv4 address, with a port or without."""


@dataclass(frozen=True)
class Settings:
    """The settings of one server.

    Raises:
        UsageError: a value is out of range, or the address needs a key.
    """

    host: str = "127.0.0.1"
    """The name or address to listen on. Others than the loopback ones need `api_key`."""
    port: int = 8080
    """The port. 0 takes a free one."""
    api_key: str | None = field(default=None, repr=False)
    """The key that clients send as `Authorization: Bearer KEY`. None asks for no key."""
    name: str | None = None
    """The model's id in requests and answers. None takes the name of its folder."""
    allow_host: tuple[str, ...] = ()
    """Further names in the `Host` header, such as that of a reverse proxy."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages that may read answers. `*` allows every page."""
    allow_url: tuple[str, ...] = ()
    """Hosts, with a port or without, that images may be fetched from."""
    allow_grammar: bool = False
    """True if clients may send grammars. llguidance never ends on some of them, which holds the server up."""
    batch_size: int = 8
    """Answers that are decoded at once."""
    max_queue: int = 64
    """Requests that wait for a place in the batch. Further ones get the status 429."""
    max_tokens: int = 1024
    """The most tokens of an answer, which is also the default of a request."""
    max_images: int = 16
    """The most images of a request."""
    max_body_mb: int = 32
    """The largest body of a request in mebibytes."""
    max_pixels: int = 50_000_000
    """The most pixels of all images of a request, 150 MB once they are decoded."""
    timeout_s: float = 300.0
    """The longest time from a complete request to the end of its answer, in seconds."""
    stop_timeout_s: float = 30.0
    """The time that answers have to end once the server was asked to stop, in seconds."""

    def __post_init__(self) -> None:
        _check("port", self.port, 0 <= self.port <= 65535, "from 0 to 65,535")
        for name in ("batch_size", "max_queue", "max_tokens", "max_body_mb", "max_pixels"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _check("max_images", self.max_images, self.max_images >= 0, "at least 0")
        for name in ("timeout_s", "stop_timeout_s"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
        for name, pattern, expected in (
            ("allow_host", HOST_NAME, "a host name, such as `mac-mini.local`"),
            ("allow_url", HOST_NAME, "a host, such as `images.example.org`"),
            ("allow_origin", ORIGIN, "an origin, such as `https://example.org`, or `*`"),
        ):
            for value in getattr(self, name):
                _check(name, value, pattern.fullmatch(value) or (name, value) == ("allow_origin", "*"), expected)
        self._check_access()

    def _check_access(self) -> None:
        key = self.api_key
        if key is not None and (len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable()):
            raise UsageError(
                f"api_key must have at least {MIN_KEY_CHARACTERS} printable ASCII characters (got {len(key)} "
                "characters). Make one with `openssl rand -hex 16`.",
                "api_key",
            )
        if key is None and not self.is_loopback:
            raise UsageError(
                f"host {self.host} can be reached from other machines, so it needs api_key (got none). Set a key, or "
                "listen on 127.0.0.1.",
                "host",
                "api_key",
            )

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request in bytes."""
        return self.max_body_mb * MEBIBYTE

    @property
    def max_in_flight(self) -> int:
        """Requests that are read, wait or run at once. Further ones are refused before their body is read."""
        return self.batch_size + self.max_queue

    def accepts_host(self, name: str) -> bool:
        """Returns whether `name`, a `Host` header without its port, is a name of this server.

        A page that rebinds its own domain to this machine sends that domain. An address cannot be rebound, and the
        names of this machine belong to nobody else.
        """
        name = name.lower()
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            own = {"localhost", self.host.lower(), *(allowed.lower() for allowed in self.allow_host)}
            if not self.is_loopback:
                machine = socket.gethostname().lower()
                own |= {machine, f"{machine.removesuffix('.local')}.local"}
            return name in own
        return True


def _check(name: str, value: object, valid: object, expected: str) -> None:
    if not valid:
        raise UsageError(f"{name} must be {expected} (got {value!r:.60})", name)
