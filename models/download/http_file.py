"""Resumable downloads of one file over HTTP.

Received bytes are in `NAME.part`, with a description in `NAME.part.json`. The file gets its name once its size and, if
known, its sha256 are correct. A part is only resumed (RFC 9110: Range with If-Range) if the server still has the same
file.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._version import __version__
from ..errors import DownloadError
from ..files import check_space, read_json_object
from ..files import sha256 as file_sha256

CHUNK_BYTES = 2**20
"""The bytes that are received at a time."""
TIMEOUT_S = 60
"""The seconds without a byte after which a connection fails."""
MAX_BYTES = 64 * 2**30
"""The largest file that is downloaded, in bytes. The largest archive has about 16 GB."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes received, total bytes)."""


@dataclass(frozen=True)
class Remote:
    """The server's description of a file."""

    url: str
    size: int
    validator: str | None
    """A strong ETag or a modification date. It shows that the file is still the same."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of `NAME.part.json`."""
        return {"url": self.url, "size": self.size, "validator": self.validator}


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    disk_factor: int = 1,
    on_progress: OnProgress = lambda received, total: None,
) -> str:
    """Downloads `url` to `target`, resuming an earlier attempt, and returns its sha256 in hex.

    A complete `target` from an earlier attempt is only downloaded again if its sha256 is wrong. Before the transfer,
    `disk_factor` times the file's size must be free on the disk.

    Raises:
        DownloadError: the server cannot be reached or does not have the file, the transfer was interrupted (the
            received part is kept), or the file is wrong (it is removed).
        OutputError: there is not enough disk space.
    """
    if target.is_file() and (digest := file_sha256(target)) == (sha256.lower() if sha256 else digest):
        return digest
    part, notes = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    start = _resumable(part, notes, url)
    response = _open(url, start, _validator(notes) if start else None)
    if response is None or _is_other(response, notes):  # no bytes after the part, or another file
        part.unlink(missing_ok=True)
        start, response = 0, _open(url, 0, None)
    with response:
        remote, start = _described(url, response, start, notes)
        check_space(target, disk_factor * remote.size - start)
        notes.write_text(json.dumps(remote.as_dict()) + "\n", encoding="utf-8")
        _receive(response, part, start, remote, on_progress)
    digest = file_sha256(part)
    if sha256 is not None and digest != sha256.lower():
        part.unlink()
        raise DownloadError(
            f"{url}: sha256 must be {sha256.lower()}, got {digest}. The file was removed. Try again later."
        )
    part.replace(target)
    notes.unlink()
    return digest


def _resumable(part: Path, notes: Path, url: str) -> int:
    """Returns the number of bytes of an earlier attempt that can be resumed, or 0."""
    if not part.is_file() or not notes.is_file():
        return 0
    noted = read_json_object(notes, DownloadError)
    received = part.stat().st_size
    same = noted.get("url") == url and isinstance(noted.get("validator"), str) and isinstance(noted.get("size"), int)
    return received if same and received < noted["size"] else 0


def _validator(notes: Path) -> str:
    return str(read_json_object(notes, DownloadError)["validator"])


def _open(url: str, start: int, validator: str | None) -> Any:
    """Returns the response from byte `start` on, or None if the server refuses that range. Raises DownloadError."""
    headers = {"User-Agent": f"fastvlm/{__version__}", "Accept-Encoding": "identity"}
    if start and validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as reason:
        if reason.code == 416:
            return None
        fault = "file not found" if reason.code == 404 else f"the server answered {reason.code} {reason.reason}"
        raise DownloadError(f"{url}: {fault}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as reason:
        cause = getattr(reason, "reason", reason)
        raise DownloadError(f"{url}: cannot be reached ({cause}). Check the connection and try again.") from None


def _is_other(response: Any, notes: Path) -> bool:
    """Returns True if the server sent a range of another file, although If-Range forbids it."""
    etag = response.headers.get("ETag")
    noted = str(read_json_object(notes, DownloadError).get("validator")) if response.status == 206 else ""
    return bool(etag and noted.startswith('"') and etag != noted)


def _described(url: str, response: Any, start: int, notes: Path) -> tuple[Remote, int]:
    """Returns the response's file and the byte at which the response begins. Raises DownloadError."""
    etag, changed = response.headers.get("ETag"), response.headers.get("Last-Modified")
    validator = etag if etag and not etag.startswith("W/") else changed
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or int(match[2]) != read_json_object(notes).get("size"):
            raise DownloadError(f"{url}: the server returned a different byte range than requested. Try again later.")
        return Remote(url, int(match[2]), validator or _validator(notes)), start
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,15}", length) or not 0 < int(length) <= MAX_BYTES:
        raise DownloadError(
            f"{url}: the server sent an invalid Content-Length (got {length!r:.40}). Nothing was downloaded."
        )
    return Remote(url, int(length), validator), 0


def _receive(response: Any, part: Path, start: int, remote: Remote, on_progress: OnProgress) -> None:
    """Writes the bytes from `start` on into `part`. Raises DownloadError if the transfer is interrupted."""
    received, cause = start, "the connection was closed"
    with part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        stream.truncate()
        on_progress(received, remote.size)
        try:
            while received < remote.size and (chunk := response.read(min(CHUNK_BYTES, remote.size - received))):
                stream.write(chunk)
                received += len(chunk)
                on_progress(received, remote.size)
        except (http.client.HTTPException, TimeoutError, ConnectionError) as reason:
            cause = str(reason) or type(reason).__name__
    if received < remote.size:
        again = "Run the command again to resume." if remote.validator else "Run the command again."
        raise DownloadError(f"{remote.url}: interrupted after {received:,} of {remote.size:,} bytes ({cause}). {again}")
