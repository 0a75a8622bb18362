"""The images of a request: from data URLs, and from hosts that the server allows, to the encoder's square of pixels.

A URL is fetched from an address that was checked: a name is resolved once, addresses of private networks are refused,
and each redirect is checked again. So a client cannot make the server read its own network.
"""

from __future__ import annotations

import base64
import binascii
import collections
import contextlib
import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image

from ...models.errors import ImageError
from ...models.images import Fit, open_images, preprocess
from ..timings import LapClock
from .settings import Settings

DATA_URL = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)

FETCH_SECONDS = 10.0
"""The time for one image, with its redirects: as long as a person waits."""

MAX_REDIRECTS = 3
"""Redirects that are followed. A file's download needs one or two."""

MAX_DECODING = 4
"""Requests whose images are decoded at once, 150 MB each at most by default."""

MAX_CACHED = 16
"""Images that are kept as squares of pixels, 3 MB each at 1024 px. A chat sends its images with every question."""


class ImageReader:
    """Opens the images of requests, several threads at once."""

    def __init__(self, settings: Settings, image_size: int) -> None:
        self._settings = settings
        self._image_size = image_size
        self._squares: collections.OrderedDict[tuple[bytes, Fit], Image.Image] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.BoundedSemaphore(MAX_DECODING)

    def read(self, url: str) -> bytes:
        """Returns the bytes of an image. Raises ImageError."""
        if url[:5].lower() == "data:":
            return from_data_url(url)
        if not url[:8].lower().startswith(("http://", "https://")):
            raise ImageError(
                f"an image's URL must be a data URL or an http(s) URL (got {url[:40]!r}). Send the image as "
                "`data:image/png;base64,...`."
            )
        return self._fetch(url)

    def squares(self, images: Sequence[bytes], fit: Fit) -> tuple[tuple[Image.Image, ...], float, float]:
        """Returns images as squares of the encoder's size, in RGB, and the times of decoding and preprocessing in ms.

        Preprocessing them again changes nothing, so the engine has less to do, and a request that waits takes 3 MB per
        image instead of its full size.

        Raises:
            ImageError: an image cannot be opened, or all have too many pixels together.
        """
        keys = [(hashlib.sha256(content).digest(), fit) for content in images]
        with self._lock:
            known = {key: self._squares[key] for key in keys if key in self._squares}
            for key in known:
                self._squares.move_to_end(key)
        unknown = {key: content for key, content in zip(keys, images, strict=True) if key not in known}
        with self._decoding:
            clock = LapClock()
            opened = open_images(list(unknown.values()), self._settings.max_pixels)
            decode_ms = clock.lap_ms()
            made = {
                key: Image.fromarray(preprocess(image, self._image_size, fit).transpose(1, 2, 0))  # (S, S, 3)
                for key, image in zip(unknown, opened, strict=True)
            }
            preprocess_ms = clock.lap_ms()
        with self._lock:
            self._squares.update(made)
            while len(self._squares) > MAX_CACHED:
                self._squares.popitem(last=False)
        return tuple((known.get(key) or made[key]) for key in keys), decode_ms, preprocess_ms

    def _fetch(self, url: str) -> bytes:
        deadline = time.monotonic() + FETCH_SECONDS
        for _ in range(MAX_REDIRECTS + 1):
            parts = checked_url(url, self._settings.allow_url)
            try:
                content, location = _get(parts, deadline, self._settings.max_body_bytes)
            except (OSError, http.client.HTTPException) as reason:
                raise ImageError(f"the image at {parts.hostname} cannot be fetched: {_reason(reason)}") from None
            if location is None:
                return content
            url = urljoin(url, location)
        raise ImageError(f"the image at {parts.hostname} cannot be fetched: more than {MAX_REDIRECTS} redirects")


def from_data_url(url: str) -> bytes:
    """Returns the bytes of a base64 data URL. Raises ImageError."""
    head = DATA_URL.match(url[:200])
    if head is None:
        raise ImageError(
            f"an image's data URL must be base64 (got {url[:40]!r}). Send `data:image/png;base64,` and the bytes."
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as reason:
        raise ImageError(f"an image's data URL is not valid base64: {reason}") from None


def checked_url(url: str, allowed: Sequence[str]) -> SplitResult:
    """Returns the parts of a URL whose host is allowed. Raises ImageError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as reason:
        raise ImageError(f"an image's URL is malformed: {reason}") from None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ImageError("an image's URL must be an http(s) URL of printable ASCII characters")
    usual = 443 if parts.scheme == "https" else 80
    wanted = {host} if port in (None, usual) else set()
    if not (wanted | {f"{host}:{port or usual}"}) & {name.lower() for name in allowed}:
        raise ImageError(
            f"images may not be fetched from {host}{f':{port}' if port else ''}. Send the image as a data URL, or "
            "start the server with --allow-url for this host."
        )
    return parts


def address_of(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Returns the one address of a host that a connection may use.

    All addresses of a name must be public. A literal address is used as it is, because the server's owner allowed it.

    Raises:
        ImageError: the name has an address in a private network.
        OSError: the name cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [(family, (str(place[0]), port)) for family, _, _, _, place in found]
    if not _is_address(host):
        for _, (address, _) in addresses:
            if not ipaddress.ip_address(address.partition("%")[0]).is_global:
                raise ImageError(f"images may not be fetched from {host}: its address is in a private network")
    return addresses[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _get(parts: SplitResult, deadline: float, max_bytes: int) -> tuple[bytes, str | None]:
    """Returns the body of a response, or the target of its redirect. Raises ImageError, OSError and HTTPException."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    family, address = address_of(host, port)
    connection = http.client.HTTPConnection(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as plain:
        plain.settimeout(_left(deadline))
        plain.connect(address)
        with _encrypted(plain, host) if parts.scheme == "https" else plain as link, _closed_at(deadline, link):
            if isinstance(link, ssl.SSLSocket):
                link.do_handshake()
            connection.sock = link
            target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "fastvlm"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return b"", response.getheader("Location") or ""
            if response.status != 200:
                raise ImageError(f"the image at {host} cannot be fetched: status {response.status}")
            return _body(response, max_bytes, host), None


def _encrypted(plain: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


@contextlib.contextmanager
def _closed_at(deadline: float, link: socket.socket) -> Iterator[None]:
    """Ends a connection at `deadline`, however slowly the other side sends.

    A socket's own timeout starts again with every byte.
    """

    def end() -> None:
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left(deadline), end)
    timer.daemon = True
    timer.start()
    try:
        yield
        _left(deadline)
    except (OSError, http.client.HTTPException, ValueError):
        _left(deadline)  # the reason is the clock
        raise
    finally:
        timer.cancel()


def _body(response: http.client.HTTPResponse, max_bytes: int, host: str) -> bytes:
    content = response.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ImageError(f"the image at {host} is too large: must have at most {max_bytes:,} bytes. Scale it down.")
    return content


def _left(deadline: float) -> float:
    """Returns the seconds until `deadline`. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took more than {FETCH_SECONDS:.0f} s")
    return left


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(c for c in text.splitlines()[0] if c.isprintable())[:100]
