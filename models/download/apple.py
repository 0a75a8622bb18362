"""Downloads one of Apple's archives, and unpacks it into a folder that only appears when it is complete.

An archive is untrusted. It cannot write outside its folder or more than its size allows.
"""

from __future__ import annotations

import errno
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DownloadError
from ..files import check_space
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
from .http_file import OnProgress, fetch

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
CHUNK_BYTES = 2**20
"""The bytes that are unpacked at a time."""
IGNORED = ("__MACOSX", ".DS_Store")
"""Prefixes of the files that macOS adds to an archive."""


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
