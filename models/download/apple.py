"""Downloads one of Apple's archives, and unpacks it into a folder that only appears when it is complete.

An archive is untrusted. It cannot write outside its folder or more than its size allows.

The download resumes. Received bytes are in `NAME.part`, with a description in `NAME.part.json`. The file gets its name
once its size and, if known, its sha256 are correct. A part is only resumed (RFC 9110: Range with If-Range) if the
server still has the same file.
"""

from __future__ import annotations

import errno
import http.client
import json
import re
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..._version import __version__
from ..errors import DownloadError
from ..files import check_space, read_json_object
from ..files import sha256 as file_sha256
from .archives import FOLDERS, archive_url, is_needed
from .destination import (
    add_missing,
    check_checkpoint,
    check_free,
    file_sizes,
    missing_files,
    publish,
    read_record,
    recorded_sizes,
    work_folder,
    write_record,
)

DISK_FACTOR = 2
"""Disk space to reserve, as a multiple of the archive size: the archive plus the extracted files."""
MAX_MEMBERS = 10_000
"""The highest number of files in an archive. A checkpoint has about 20."""
MAX_UNPACKED_BYTES = 64 * 2**30
"""The highest total size of the files in an archive, in bytes. The largest checkpoint has about 16 GB."""
MAX_RATIO = 50
"""The highest ratio of unpacked to packed bytes. Weights hardly compress, and JSON compresses to a tenth."""
SMALL_BYTES = 16 * 2**20
"""The unpacked size in bytes that is accepted at any ratio."""
IGNORED = ("__MACOSX", ".DS_Store")
"""Prefixes of the files that macOS adds to an archive."""

CHUNK_BYTES = 2**20
"""The bytes that are received or unpacked at a time."""
TIMEOUT_S = 60
"""The seconds without a byte after which a connection fails."""
MAX_BYTES = 64 * 2**30
"""The largest file that is downloaded, in bytes. The largest archive has about 16 GB."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes received, total bytes)."""


def download_archive(
    name: str,
    destination: Path,
    *,
    url: str | None = None,
    sha256: str | None = None,
    on_progress: OnProgress = lambda received, total: None,
) -> dict[str, Any]:
    """Downloads one of `FOLDERS` into `destination` and returns its record: url and sha256 of the archive.

    An earlier attempt in `.DESTINATION.download` is resumed. In a folder that an earlier call filled, only missing
    files are added. Apple publishes no checksums. Without `sha256`, the size, the archive's own checksums and the
    headers of the weights are checked.

    Raises:
        DownloadError: the download or the archive failed (see `fetch` and `unpack`), or it has no checkpoint.
        OutputError: the destination is in use, or the disk is full.
    """
    sizes, recorded_sha256 = _filled_from(name, sha256, read_record(destination))
    if sizes and not missing_files(destination, sizes):
        return {"already_there": True}
    if sizes:  # the existing files stay, and came from the archive with this sha256
        destination, sha256 = destination.resolve(), recorded_sha256
    else:
        check_free(destination)
    with work_folder(destination) as work:
        if not sizes:
            check_free(destination)  # again, because another download may have finished before the lock
        archive = work / f"{FOLDERS[name]}.zip"
        source = url or archive_url(name)
        digest = fetch(source, archive, sha256=sha256, disk_factor=DISK_FACTOR, on_progress=on_progress)
        check_space(destination, archive.stat().st_size)
        unpacked = work / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        try:
            check_checkpoint(unpack(archive, unpacked, is_needed), source)
        except DownloadError:
            archive.unlink()  # it would fail again
            raise
        record = {
            "archive": name,
            "url": source,
            "sha256": digest,
            "sha256_was_known": sha256 is not None,
            "sizes": file_sizes(unpacked),
        }
        write_record(unpacked, record)
        if sizes:
            add_missing(unpacked, destination, sizes)
        else:
            publish(unpacked, destination)
    return record


def _filled_from(name: str, sha256: str | None, record: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """Returns the file sizes and the archive's sha256 if the record is of this archive, else empty values."""
    known = record.get("sha256")
    if record.get("archive") != name or not isinstance(known, str) or (sha256 or known).lower() != known:
        return {}, ""
    return recorded_sizes(record), known


def unpack(archive: Path, folder: Path, is_needed: Callable[[str], bool]) -> list[str]:
    """Unpacks the needed files of a zip archive into `folder`, without their common top folder.

    Returns their paths.

    Raises:
        DownloadError: the zip archive is incomplete, or has absolute paths, `..`, links, passwords, duplicate names or
            too much content for its size. The content of `folder` is then untrusted.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check_members(opened.infolist(), archive.stat().st_size)
            common = _common_folder([member.filename for member in members])
            written = []
            for member in members:
                name = member.filename.removeprefix(common)
                if is_needed(name):
                    _write(opened, member, folder / name)
                    written.append(name)
            return written
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as reason:
        raise DownloadError(f"{archive.name}: is not a complete zip archive ({reason}). Download it again.") from None
    except OSError as reason:
        if reason.errno != errno.EINVAL:
            raise
        # an offset in the archive that no file can have
        raise DownloadError(f"{archive.name}: is not a complete zip archive. Download it again.") from None


def _check_members(members: list[zipfile.ZipInfo], packed_bytes: int) -> None:
    """Raises DownloadError if a member, needed or not, could do harm."""
    if len(members) > MAX_MEMBERS:
        raise DownloadError(
            f"the archive must have at most {MAX_MEMBERS} files, got {len(members)}. Nothing was unpacked."
        )
    seen: set[str] = set()
    for member in members:
        fault = _fault(member)
        if not fault and member.filename.casefold() in seen:  # file systems of Macs ignore case
            fault = "is in it twice"
        if fault:
            raise DownloadError(f"the archive's {member.filename!r:.80} {fault}. Nothing was unpacked.")
        seen.add(member.filename.casefold())
    total = sum(member.file_size for member in members)
    if total > min(MAX_UNPACKED_BYTES, max(SMALL_BYTES, MAX_RATIO * packed_bytes)):
        raise DownloadError(
            f"the archive of {packed_bytes:,} bytes would unpack to {total:,}, so it is not a checkpoint. "
            "Nothing was unpacked."
        )


def _fault(member: zipfile.ZipInfo) -> str | None:
    path, mode = PurePosixPath(member.filename), member.external_attr >> 16
    if path.is_absolute() or "\\" in member.orig_filename or "\0" in member.orig_filename or ":" in member.filename:
        return "is not a plain relative path"
    if not path.parts or ".." in path.parts:
        return "leads out of its folder"
    if stat.S_ISLNK(mode) or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "has an unsupported compression method"
    return None


def _common_folder(names: list[str]) -> str:
    """Returns `folder/` if every name starts with it, else an empty string."""
    tops = {name.partition("/")[0] for name in names if not name.startswith(IGNORED)}
    only = next(iter(tops), "")
    return f"{only}/" if len(tops) == 1 and all("/" in n for n in names if not n.startswith(IGNORED)) else ""


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with archive.open(member) as source, target.open("xb") as stream:
        while chunk := source.read(CHUNK_BYTES):  # the last read checks the CRC
            left -= len(chunk)
            if left < 0:
                raise DownloadError(
                    f"the archive's {member.filename!r:.80} is larger than declared. Download it again."
                )
            stream.write(chunk)
    if left:
        raise DownloadError(f"the archive's {member.filename!r:.80} is smaller than declared. Download it again.")


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
