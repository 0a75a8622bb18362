"""A server on this machine that answers as Apple's and the hub's do, and as broken ones do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """What is served, how, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = None
        """In place of the content's own."""
        self.cut_after: int | None = None
        """Bytes after which a connection is closed, once."""
        self.status: int | None = None
        self.claimed_length: int | None = None
        self.ignore_if_range = False
        self.asked: list[tuple[str, str | None]] = []
        """(path, Range) of each request."""
        self.url = ""

    def etag_of(self, content: bytes) -> str:
        return self.etag or f'"{hashlib.sha256(content).hexdigest()}"'


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path, wanted = self.path.partition("?")[0], self.headers.get("Range")
            state.asked.append((path, wanted))
            content = state.files.get(path)
            if state.status or content is None:
                self.send_response(state.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            etag, start = state.etag_of(content), 0
            fresh = state.ignore_if_range or self.headers.get("If-Range") in (None, etag)
            if wanted and fresh:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                self.send_response(206 if start < len(content) else 416)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", etag)
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Type", "application/json" if path.startswith("/api/") else "application/zip")
            self.send_header("Content-Length", str(state.claimed_length or len(content) - start))
            self.end_headers()
            if body:
                self.send_body(content[start:])

        def send_body(self, content: bytes) -> None:
            cut, state.cut_after = state.cut_after, None
            if cut is not None or state.claimed_length:
                content, self.close_connection = content[:cut], True
            with contextlib.suppress(ConnectionError):  # the client has read enough
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def serve_repository(server: Server) -> Callable[[str, dict[str, bytes]], None]:
    """Serves a repository of the hub; files of more than 1 kB are in large-file storage."""

    def serve(hub_id: str, files: dict[str, bytes]) -> None:
        commit, siblings = "c" * 40, []
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}} if len(content) > 1000 else {}
            siblings.append({"rfilename": name, "size": len(content), "blobId": sha256[:40], **lfs})
            server.files[f"/{hub_id}/resolve/{commit}/{name}"] = content
        info = json.dumps({"id": hub_id, "sha": commit, "siblings": siblings, "private": False}).encode()
        tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings]
        for revision in ("main", commit):
            server.files[f"/api/models/{hub_id}/revision/{revision}"] = info
            server.files[f"/api/models/{hub_id}/tree/{revision}"] = json.dumps(tree).encode()
        server.files[f"/api/models/{hub_id}"] = info

    return serve
