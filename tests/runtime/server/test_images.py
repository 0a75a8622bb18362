"""Images of requests: data URLs, allowed hosts, and the squares that the engine gets."""

from __future__ import annotations

import base64
import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvlm.models.errors import ImageError
from fastvlm.models.images import Fit, open_image, preprocess
from fastvlm.runtime.server import images
from fastvlm.runtime.server.images import ImageReader, address_of, checked_url, from_data_url
from fastvlm.runtime.server.settings import Settings

from .conftest import data_url, png

Reply = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def host() -> Iterator[Callable[[Reply], str]]:
    """A web server on this machine: `host(reply)` starts it and returns `address:port`."""
    servers = []

    def start(reply: Reply) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                reply(self)

            def log_message(self, *arguments: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: http.server.BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def reader_for(*allowed: str, **limits: int) -> ImageReader:
    return ImageReader(Settings(allow_url=allowed, **limits), 64)


@given(content=st.binary(max_size=200))
def test_data_url_gives_its_bytes(content: bytes) -> None:
    assert from_data_url(data_url(content)) == content


@pytest.mark.parametrize(
    "url",
    [
        "data:,x",
        "data:image/png,x",
        "data:text/html;base64,eA==",
        "data:image/png;base64,!",
        "data:image/png;base64,eA",
    ],
)
def test_malformed_data_url_is_refused(url: str) -> None:
    with pytest.raises(ImageError, match="base64"):
        from_data_url(url)


@given(
    width=st.integers(1, 150), height=st.integers(1, 150), seed=st.integers(0, 99), fit=st.sampled_from(["pad", "crop"])
)
def test_square_is_preprocessed_to_itself(width: int, height: int, seed: int, fit: Fit) -> None:
    content = png(seed, (width, height))
    (square,), _, _ = reader_for().squares([content], fit)
    expected = preprocess(open_image(content), 64, fit)
    assert np.array_equal(preprocess(square, 64, fit), expected)


def test_same_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, contents = reader_for(), [png(1), png(2), png(1)]
    first, _, _ = reader.squares(contents, "pad")
    opened: list[int] = []
    monkeypatch.setattr(images, "open_images", lambda sources, limit: opened.append(len(sources)) or ())
    again, _, _ = reader.squares(contents, "pad")
    assert opened == [0]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True] * 3
    assert first[0] is first[2]


def test_cached_squares_are_bounded() -> None:
    reader = reader_for()
    for n in range(images.MAX_CACHED + 5):
        reader.squares([png(n, (4, 4))], "pad")
    assert len(reader._squares) == images.MAX_CACHED


def test_animated_and_hidden_formats_are_what_pillow_opens() -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "GIF")
    assert len(reader_for().squares([file.getvalue()], "pad")[0]) == 1
    with pytest.raises(ImageError, match="is a PostScript document"):
        reader_for().squares([b"%!PS-Adobe-3.0 EPSF-3.0"], "pad")


def test_image_is_fetched_from_an_allowed_host(host: Callable) -> None:
    place = host(lambda handler: send(handler, png()))
    assert reader_for(place).read(f"http://{place}/a.png?b=1") == png()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "http://allowed.example:8080/a.png",
        "http://allowed.example@evil.example/",
        "https://allowed.example.evil.example/",
        "http://allowed.example:99999/",
        "http:///a.png",
        "http://allowed.example/\r\nX: y",
        "http://allowed.example/a b",
        "ftp://allowed.example/a.png",
    ],
)
def test_url_of_another_host_is_refused(url: str) -> None:
    with pytest.raises(ImageError):
        checked_url(url, ("allowed.example",))


def test_port_is_part_of_an_allowed_host() -> None:
    assert checked_url("http://allowed.example:8080/", ("Allowed.example:8080",)).port == 8080
    assert checked_url("https://allowed.example:443/", ("allowed.example",)).port == 443
    with pytest.raises(ImageError, match="may not be fetched"):
        checked_url("http://allowed.example/", ("allowed.example:8080",))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.9", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1", "0.0.0.0"],
)
def test_name_in_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80)), (family, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    with pytest.raises(ImageError, match="private network"):
        address_of("allowed.example", 80)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found[:1])
    assert address_of("allowed.example", 80) == (socket.AF_INET, ("93.184.216.34", 80))


def test_connection_goes_to_the_address_that_was_checked(host: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    place = host(lambda handler: send(handler, handler.headers["Host"].encode()))
    port = int(place.partition(":")[2])
    asked: list[str] = []

    def checked(name: str, _: int) -> tuple:
        asked.append(name)
        return socket.AF_INET, ("127.0.0.1", port)

    monkeypatch.setattr(images, "address_of", checked)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("resolved a second time"))
    name = f"allowed.example:{port}"
    assert reader_for(name).read(f"http://{name}/") == name.encode()
    assert asked == ["allowed.example"]


def test_redirect_is_checked_again(host: Callable) -> None:
    hidden = host(lambda handler: send(handler, b"hidden"))
    open_host = host(lambda handler: send(handler, b"", 302, Location=f"http://{hidden}/"))
    with pytest.raises(ImageError, match="may not be fetched"):
        reader_for(open_host).read(f"http://{open_host}/")
    assert reader_for(open_host, hidden).read(f"http://{open_host}/") == b"hidden"


def test_endless_redirects_are_refused(host: Callable) -> None:
    place = host(lambda handler: send(handler, b"", 307, Location="/again"))
    with pytest.raises(ImageError, match="redirects"):
        reader_for(place).read(f"http://{place}/")


def test_large_and_missing_images_are_refused(host: Callable) -> None:
    place = host(lambda h: send(h, b"x" * (2**20 + 1)) if h.path == "/large" else send(h, b"", 404))
    reader = reader_for(place, max_body_mb=1)
    with pytest.raises(ImageError, match="too large"):
        reader.read(f"http://{place}/large")
    with pytest.raises(ImageError, match="status 404"):
        reader.read(f"http://{place}/gone")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["headers", "body"])
def test_slow_host_is_left_in_time(host: Callable, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.4)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        if part == "body":
            send(handler, b"")
        for _ in range(50):  # a byte every now and then, so that no single read takes long
            try:
                handler.wfile.write(b"H")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    place, start = host(drip), time.monotonic()
    with pytest.raises(ImageError, match="took more than"):
        reader_for(place).read(f"http://{place}/")
    assert time.monotonic() - start < 3


def test_broken_host_gives_one_line(host: Callable) -> None:
    place = host(lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"))
    with pytest.raises(ImageError, match="cannot be fetched") as raised:
        reader_for(place).read(f"http://{place}/")
    assert "\n" not in str(raised.value)
    with pytest.raises(ImageError, match="cannot be fetched"):
        reader_for("127.0.0.1:9").read("http://127.0.0.1:9/")


def test_base64_of_a_whole_photograph_is_exact() -> None:
    content = png(3, (300, 200))
    assert base64.b64decode(data_url(content).partition(",")[2]) == from_data_url(data_url(content)) == content
