"""A file over HTTP that can be fetched in several goes.

What has arrived lies in `NAME.part` with its description beside it; only a file whose size and, where it is known,
sha256 are right gets its name. A part is continued (RFC 9110: Range with If-Range) only while the server still holds
the very file that it is a part of.
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
from ..disk import check_space
from ..errors import DownloadError
from ..file_digest import sha256 as file_sha256
from ..json_file import read_json_object

CHUNK_BYTES = 2**20
TIMEOUT_S = 60
MAX_BYTES = 64 * 2**30
"""The largest archive has about 16 GB."""

OnProgress = Callable[[int, int], None]
"""Hears of (bytes here, bytes in all)."""


@dataclass(frozen=True)
class Remote:
    """What the server says of a file."""

    url: str
    size: int
    validator: str | None
    """A strong ETag or a date of change, by which it can be told that the file is still the same."""

    def as_dict(self) -> dict[str, Any]:
        return {"url": self.url, "size": self.size, "validator": self.validator}


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    room: int = 1,
    on_progress: OnProgress = lambda here, total: None,
) -> str:
    """Fetches `url` to `target`, going on where an earlier attempt ended, and returns its sha256 in hex.

    A `target` that is there already, whole from an earlier attempt, is not fetched again unless its sha256 is wrong.
    `room` times its size has to be free on the disk before anything is fetched.

    Raises:
        DownloadError: the server cannot be reached or has no such file, the transfer was cut off (what is here stays,
            for another attempt), or the file is not what it should be (which removes it).
        OutputError: there is too little room.
    """
    if target.is_file() and (digest := file_sha256(target)) == (sha256.lower() if sha256 else digest):
        return digest
    part, notes = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    start = _resumable(part, notes, url)
    response = _open(url, start, _validator(notes) if start else None)
    if response is None or _is_other(response, notes):  # nothing behind what is here, or the part is of no use
        part.unlink(missing_ok=True)
        start, response = 0, _open(url, 0, None)
    with response:
        remote, start = _described(url, response, start, notes)
        check_space(target, room * remote.size - start)
        notes.write_text(json.dumps(remote.as_dict()) + "\n", encoding="utf-8")
        _receive(response, part, start, remote, on_progress)
    digest = file_sha256(part)
    if sha256 is not None and digest != sha256.lower():
        part.unlink()
        raise DownloadError(
            f"{url} has sha256 {digest}, it should be {sha256.lower()}: it was removed; try again later"
        )
    part.replace(target)
    notes.unlink()
    return digest


def _resumable(part: Path, notes: Path, url: str) -> int:
    """Bytes of an earlier attempt that can be gone on from; 0 where there is none."""
    if not part.is_file() or not notes.is_file():
        return 0
    said = read_json_object(notes, DownloadError)
    here = part.stat().st_size
    same = said.get("url") == url and isinstance(said.get("validator"), str) and isinstance(said.get("size"), int)
    return here if same and here < said["size"] else 0


def _validator(notes: Path) -> str:
    return str(read_json_object(notes, DownloadError)["validator"])


def _open(url: str, start: int, validator: str | None) -> Any:
    """The response from byte `start` on; None when the server refuses that range. Raises DownloadError."""
    headers = {"User-Agent": f"fastvlm/{__version__}", "Accept-Encoding": "identity"}
    if start and validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as reason:
        if reason.code == 416:
            return None
        found = "there is no such file" if reason.code == 404 else f"the server answers {reason.code} {reason.reason}"
        raise DownloadError(f"{url}: {found}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as reason:
        cause = getattr(reason, "reason", reason)
        raise DownloadError(f"{url} cannot be reached ({cause}): check the connection and try again") from None


def _is_other(response: Any, notes: Path) -> bool:
    """Whether a server that sends a range, whatever was asked, holds another file than the part is of."""
    etag = response.headers.get("ETag")
    said = str(read_json_object(notes, DownloadError).get("validator")) if response.status == 206 else ""
    return bool(etag and said.startswith('"') and etag != said)


def _described(url: str, response: Any, start: int, notes: Path) -> tuple[Remote, int]:
    """The file that a response is of, and the byte that it begins at. Raises DownloadError."""
    etag, changed = response.headers.get("ETag"), response.headers.get("Last-Modified")
    validator = etag if etag and not etag.startswith("W/") else changed
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or int(match[2]) != read_json_object(notes).get("size"):
            raise DownloadError(f"{url}: the server answers with another range than was asked for: try again later")
        return Remote(url, int(match[2]), validator or _validator(notes)), start
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,15}", length) or not 0 < int(length) <= MAX_BYTES:
        raise DownloadError(f"{url}: the server does not tell a size that can be ({length!r:.40}): not fetched")
    return Remote(url, int(length), validator), 0


def _receive(response: Any, part: Path, start: int, remote: Remote, on_progress: OnProgress) -> None:
    """Writes what comes behind the `start` bytes that are here. Raises DownloadError unless it is all there then."""
    here, cause = start, "the connection was closed"
    with part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        stream.truncate()
        on_progress(here, remote.size)
        try:
            while here < remote.size and (chunk := response.read(min(CHUNK_BYTES, remote.size - here))):
                stream.write(chunk)
                here += len(chunk)
                on_progress(here, remote.size)
        except (http.client.HTTPException, TimeoutError, ConnectionError) as reason:
            cause = str(reason) or type(reason).__name__
    if here < remote.size:
        again = "run the same command again to go on" if remote.validator else "run the same command again"
        raise DownloadError(f"{remote.url} was cut off after {here:,} of {remote.size:,} bytes ({cause}): {again}")
