"""A local server with the answers of Apple's and the hub's servers, and with faulty ones.

    python tests/hub_server.py FOLDER OWNER/NAME BYTES_PER_SECOND

serves a checkpoint's folder as that repository and as each of Apple's archives, prints its address, and ends when stdin
closes. `serving` runs one in a thread for tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
PIECES_PER_SECOND = 50


class Server:
    """The served files, the faults, and the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = None
        """An ETag in place of the content's."""
        self.cut_after: int | None = None
        """The bytes after which a connection is closed, once."""
        self.status: int | None = None
        self.claimed_length: int | None = None
        self.ignore_if_range = False
        self.bytes_per_second: int | None = None
        """The speed of each connection, or None for no limit."""
        self.asked: list[tuple[str, str | None]] = []
        """The path and Range of each request."""
        self.url = ""

    def etag_of(self, content: bytes) -> str:
        return self.etag or f'"{hashlib.sha256(content).hexdigest()}"'

    def add_repository(self, hub_id: str, files: Mapping[str, bytes]) -> None:
        """Serves a repository of the hub, with files of more than 1 kB in large-file storage."""
        siblings = []
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}} if len(content) > 1000 else {}
            siblings.append({"rfilename": name, "size": len(content), "blobId": sha256[:40], **lfs})
            self.files[f"/{hub_id}/resolve/{COMMIT}/{name}"] = content
        info = json.dumps({"id": hub_id, "sha": COMMIT, "siblings": siblings, "private": False}).encode()
        tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings]
        for revision in ("main", COMMIT):
            self.files[f"/api/models/{hub_id}/revision/{revision}"] = info
            self.files[f"/api/models/{hub_id}/tree/{revision}"] = json.dumps(tree).encode()
        self.files[f"/api/models/{hub_id}"] = info

    def add_archive(self, path: str, folder: str, files: Mapping[str, bytes]) -> None:
        """Serves a zip at `path` with the files in one folder, the form of Apple's checkpoints."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"{folder}/{name}", content)
        self.files[path] = packed.getvalue()


class Handler(BaseHTTPRequestHandler):
    """A handler for the `state` of a subclass."""

    protocol_version = "HTTP/1.1"
    state: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        state, path, wanted = self.state, self.path.partition("?")[0], self.headers.get("Range")
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
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json" if path.startswith("/api/") else "application/zip")
        self.send_header("Content-Length", str(state.claimed_length or len(content) - start))
        self.end_headers()
        if body:
            self.send_body(content[start:])

    def send_body(self, content: bytes) -> None:
        state = self.state
        cut, state.cut_after = state.cut_after, None
        if cut is not None or state.claimed_length:
            content, self.close_connection = content[:cut], True
        with contextlib.suppress(ConnectionError):  # the client has read enough
            if state.bytes_per_second is None:
                self.wfile.write(content)
                return
            piece = max(1, state.bytes_per_second // PIECES_PER_SECOND)
            for start in range(0, len(content), piece):
                self.wfile.write(content[start : start + piece])
                time.sleep(1 / PIECES_PER_SECOND)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Runs a server in a thread until the block ends."""
    state = Server()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    httpd.daemon_threads = True
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()  # how soon it ends
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()


def main() -> None:
    folder, hub_id, bytes_per_second = sys.argv[1:]
    from fastvlm.models.download.archives import FOLDERS

    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    with serving() as server:
        server.bytes_per_second = int(bytes_per_second)
        server.add_repository(hub_id, files)
        for name in FOLDERS.values():
            server.add_archive(f"/{name}.zip", name, files)
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
