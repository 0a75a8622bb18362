"""The socket, the connections and the end of a server."""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import pytest

from fastvlm.models.errors import MachineError
from fastvlm.runtime.server import run
from fastvlm.runtime.server.run import Server, bind, url_of
from fastvlm.runtime.server.settings import Settings

from ..processes import until
from .conftest import CHAT, events, question

Start = Callable[..., AbstractContextManager[Server]]


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_port_in_use_is_reported_with_its_argument() -> None:
    with bind(Settings(port=0)) as taken:
        taken.listen()
        with pytest.raises(MachineError, match="is in use by another program") as raised:
            bind(Settings(port=taken.getsockname()[1]))
    assert raised.value.arguments == ("port",)


def test_address_of_another_machine_is_reported() -> None:
    with pytest.raises(MachineError, match="cannot listen on 192.0.2.1:0"):
        bind(Settings(host="192.0.2.1", port=0, api_key="long enough"))
    with pytest.raises(MachineError, match="cannot listen on"):
        bind(Settings(host="name.invalid", port=0, api_key="long enough"))


def test_no_client_connects_before_the_model_is_ready() -> None:
    with bind(Settings(port=0)) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname()[:2])


def test_url_of_an_ipv6_address_has_brackets() -> None:
    try:
        listener = bind(Settings(host="::1", port=0))
    except MachineError:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_slow_headers_close_the_connection(server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    with connect(server) as connection:
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_second_request_of_a_connection_has_its_own_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b'"queued":0}' not in answer:
                answer += connection.recv(4096)
            time.sleep(0.2)


@pytest.mark.parametrize(
    "sent", [b"\x00\x01\x02", b"GET / HTTP/9\r\n\r\n", b"POST /\r\n\r\n", b"GET " + b"x" * 100_000]
)
def test_nonsense_on_a_connection_is_refused(server: Server, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b" 400 " in connection.recv(4096)
    assert httpx.get(server.url + "/health").status_code == 200


def test_large_body_is_refused_before_it_is_sent(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(server) as connection:
        connection.sendall(f"{head}Content-Length: {2**30}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)


def test_pieces_are_sent_at_once(server: Server) -> None:
    times = []
    with httpx.Client(base_url=server.url) as client:
        for _ in range(10):
            start = time.perf_counter()
            client.get("/health")
            times.append(time.perf_counter() - start)
    assert sorted(times)[5] < 0.035  # a packet that waits for the acknowledgement of the last one takes 40 ms


def test_running_answer_ends_before_the_server(start_server: Start) -> None:
    body = question(max_tokens=200, stream=True)
    with start_server() as server, httpx.stream("POST", server.url + CHAT, json=body) as response:
        server.stop()
        found = events(response)
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_answer_that_takes_too_long_ends_with_an_event(start_server: Start) -> None:
    body = question(max_tokens=1000, stream=True)
    with start_server(stop_timeout_s=0.2) as server, httpx.stream("POST", server.url + CHAT, json=body) as response:
        server.stop()
        found = events(response)
    assert found[-1]["error"]["code"] == "stopping"


def test_stopping_server_refuses_requests_of_open_connections(start_server: Start) -> None:
    answers: list[httpx.Response] = []
    with start_server(stop_timeout_s=3) as server, connect(server) as connection:
        body = json.dumps(question()).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])

        def slow() -> None:
            answers.append(httpx.post(server.url + CHAT, json=question(max_tokens=300), timeout=30))

        thread = threading.Thread(target=slow)
        thread.start()
        assert until(lambda: server.service.in_flight == 2)
        server.stop()
        connection.sendall(body[5:])  # it was admitted before
        assert b" 200 OK" in connection.recv(4096)
        thread.join()
    assert answers[0].status_code == 200


ARENAS = """
import ctypes, sys, threading
from fastvlm.runtime.server.run import _share_malloc_arena
if sys.argv[1] == "shared":
    _share_malloc_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
threads = [threading.Thread(target=libc.malloc, args=(1000,)) for _ in range(3)]
for thread in threads:
    thread.start()
    thread.join()
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="this C library is not glibc")
def test_later_threads_allocate_from_the_main_arena(tmp_path: Path) -> None:
    counts = {}
    for name in ("own", "shared"):
        file = tmp_path / name
        subprocess.run([sys.executable, "-c", ARENAS, name, str(file)], check=True)
        counts[name] = file.read_text().count("<heap nr=")
    assert counts["own"] > 1
    assert counts["shared"] == 1
