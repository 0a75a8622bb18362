"""Thousands of requests from several clients: right ones, malformed ones, oversized ones, and clients that leave.

python tests/soak/soak_server.py [--requests 10000] [--clients 8] [--seed 0]

Fails if an answer is wrong or lost, if a bad request has a wrong status, if the log has a traceback, if a place in the
batch is never freed, or if the server's memory grows by more than 50 MB.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fuzz_server import export, served
from PIL import Image

CHAT = "/v1/chat/completions"
MAX_BODY_MB = 1
MAX_GROWTH_BYTES = 50 * 2**20
WARM_SHARE = 0.2
"""The share of the requests after which caches are full and memory must stay flat."""

MALFORMED, OVERSIZED, LEAVING = 0.20, 0.05, 0.10
"""The shares of requests that are malformed, are too large, and whose client leaves in the middle of its answer."""

TEXTS = ("Describe the image.", "What is written?", "What colour is it?", "How many shapes are there?")


def picture(seed: int) -> str:
    """A data URL of coloured rectangles."""
    rng = np.random.default_rng(seed)
    pixels = np.full((96, 128, 3), rng.integers(0, 255, 3), np.uint8)
    left, top = rng.integers(0, 64, 2)
    pixels[top : top + 32, left : left + 48] = rng.integers(0, 255, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def questions() -> list[dict[str, Any]]:
    """Requests with known answers: with and without images, greedy and sampled, with one turn and with three."""
    found: list[dict[str, Any]] = []
    for n in range(24):
        parts: list[dict[str, Any]] = [{"type": "text", "text": TEXTS[n % len(TEXTS)]}]
        parts += [{"type": "image_url", "image_url": {"url": picture(n + k)}} for k in range(n % 3)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if n % 4 == 3:
            messages += [{"role": "assistant", "content": "A circle."}, {"role": "user", "content": "And then?"}]
        sampled = {"temperature": 1.0, "seed": n} if n % 2 else {}
        found.append({"messages": messages, "max_tokens": 3 + n % 6, **sampled})
    return found


MALFORMED_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 3}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    *(
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%s"}}]}]}' % url
        for url in (b"data:image/png;base64,AAAA", b"http://10.0.0.1/a.png")
    ),
    b'{"messages": [{"role": "user", "content": "<image>"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "regex": "("}',
    b'{"messages": "\\ud800"}',
    b"\xff\xfe" * 50,
)


class Soak:
    """The clients, and what they saw."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.url = url
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._count = count
        self._seed = seed
        self._lock = threading.Lock()
        self._questions = questions()
        with httpx.Client(base_url=url, timeout=60) as client:
            self._expected = [self._text(client, body) for body in self._questions]
        self._memory_at: dict[int, int] = {}

    def work(self, clients: int, pid: int) -> None:
        """Makes all requests. Records the server's memory every 500 of them."""
        numbers = iter(range(self._count))

        def client_loop(own: int) -> None:
            rng = random.Random(f"{self._seed} {own}")
            with httpx.Client(base_url=self.url, timeout=60) as client:
                while True:
                    with self._lock:
                        number = next(numbers, None)
                        if number is not None and number % 500 == 0:
                            self._memory_at[number] = resident_bytes(pid)
                    if number is None:
                        return
                    self._one(client, rng)

        threads = [threading.Thread(target=client_loop, args=(own,)) for own in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._memory_at[self._count] = resident_bytes(pid)

    def growth(self) -> int:
        """Returns the bytes by which the server grew after its caches were full."""
        warm = min(at for at in self._memory_at if at >= WARM_SHARE * self._count)
        return self._memory_at[self._count] - self._memory_at[warm]

    def _one(self, client: httpx.Client, rng: random.Random) -> None:
        draw = rng.random()
        try:
            if draw < MALFORMED:
                self._refused(client, rng.choice(MALFORMED_BODIES), 400, "malformed")
            elif draw < MALFORMED + OVERSIZED:
                self._refused(client, b" " * (MAX_BODY_MB * 2**20 + 1), 413, "oversized")
            elif draw < MALFORMED + OVERSIZED + LEAVING:
                self._leave(rng.choice(self._questions), rng)
            else:
                self._answered(client, rng)
        except httpx.HTTPError as reason:
            self._fault(f"{type(reason).__name__}: {reason}")

    def _refused(self, client: httpx.Client, content: bytes, status: int, name: str) -> None:
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        self._add(f"{name}, {response.status_code}")
        if response.status_code != status or "error" not in response.json():
            self._fault(f"{name}: {response.status_code} for {content[:200]!r}")

    def _leave(self, body: dict[str, Any], rng: random.Random) -> None:
        """Sends a request, reads a little of the answer or nothing, and closes the connection."""
        host, port = self.url.removeprefix("http://").split(":")
        content = json.dumps({**body, "stream": rng.random() < 0.7, "max_tokens": 400}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(sent[: rng.choice((len(sent), len(sent), len(sent) // 2))])
            if rng.random() < 0.5:
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    connection.recv(rng.choice((1, 400)))
        self._add("left early")

    def _answered(self, client: httpx.Client, rng: random.Random) -> None:
        number = rng.randrange(len(self._questions))
        streams = rng.random() < 0.5
        text = self._text(client, {**self._questions[number], "stream": streams})
        self._add("answered, streamed" if streams else "answered, whole")
        if text != self._expected[number]:
            self._fault(f"question {number}: {text!r} instead of {self._expected[number]!r}")

    def _text(self, client: httpx.Client, body: dict[str, Any]) -> str:
        response = client.post(CHAT, json=body)
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:300]}"
        if not body.get("stream"):
            return response.json()["choices"][0]["message"]["content"]
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return f"lost after {lines[-1][:300]}"
        return "".join(
            choice["delta"].get("content", "") for line in lines[:-1] for choice in json.loads(line)["choices"]
        )

    def _add(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    import psutil

    return psutil.Process(pid).memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="an exported folder, instead of a new one of tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, log = arguments.model or export(Path(place) / "model"), Path(place) / "log"
        options = ("--max-body-mb", str(MAX_BODY_MB), "--max-tokens", "400", "--quiet", "--max-queue", "256")
        with served(folder.resolve(), *options, log=log) as (url, process):
            start = time.monotonic()
            soak = Soak(url, arguments.requests, arguments.seed)
            soak.work(arguments.clients, process.pid)
            seconds = time.monotonic() - start
            time.sleep(2)
            health = httpx.get(f"{url}/health").json()
        tracebacks = log.read_text().count("Traceback")
    for name, count in sorted(soak.counts.items()):
        print(f"{name:24} {count:>6}")
    growth = soak.growth()
    print(f"{arguments.requests} requests in {seconds:.0f} s by {arguments.clients} clients")
    print(f"memory grew by {growth / 2**20:.1f} MiB, tracebacks {tracebacks}, still running {health['running']}")
    print(f"exit code {process.returncode}, {len(soak.faults)} faults", *soak.faults[:10], sep="\n")
    right = not soak.faults and not tracebacks and not health["running"] and not process.returncode
    sys.exit(0 if right and growth <= MAX_GROWTH_BYTES else 1)


if __name__ == "__main__":
    main()
