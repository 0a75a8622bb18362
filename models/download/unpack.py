"""An archive from elsewhere, unpacked without letting it write where it likes or as much as it likes."""

from __future__ import annotations

import errno
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..errors import DownloadError

MAX_MEMBERS = 10_000
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_RATIO = 50
"""Of unpacked to packed, over all of the archive: weights hardly shrink, and JSON to a tenth."""
SMALL_BYTES = 16 * 2**20
"""Whatever the ratio, this much may come out."""
CHUNK_BYTES = 2**20
IGNORED = ("__MACOSX", ".DS_Store")


def unpack(archive: Path, folder: Path, is_needed: Callable[[str], bool]) -> list[str]:
    """Writes the needed files of a zip archive into `folder`, without the one folder that they share there.

    Returns their paths.

    Raises:
        DownloadError: this is no whole zip archive, or one with absolute paths, `..`, links, passwords, two files of
            one name, or more in it than its size allows. Nothing may be trusted in `folder` then.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            check_members(opened.infolist(), archive.stat().st_size)
            shared = _shared_folder([member.filename for member in members])
            written = []
            for member in members:
                name = member.filename.removeprefix(shared)
                if is_needed(name):
                    _write(opened, member, folder / name)
                    written.append(name)
            return written
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as reason:
        raise DownloadError(f"{archive.name} is not a whole zip archive ({reason}): fetch it again") from None
    except OSError as reason:
        if reason.errno != errno.EINVAL:
            raise
        # a place in the archive that no file can have
        raise DownloadError(f"{archive.name} is not a whole zip archive: fetch it again") from None


def check_members(members: list[zipfile.ZipInfo], packed_bytes: int) -> None:
    """Raises DownloadError when a member, needed or not, could do harm."""
    if len(members) > MAX_MEMBERS:
        raise DownloadError(
            f"the archive holds {len(members)} files, a checkpoint less than {MAX_MEMBERS}: not unpacked"
        )
    seen: set[str] = set()
    for member in members:
        fault = _fault(member)
        if not fault and member.filename.casefold() in seen:  # file systems of Macs fold case
            fault = "comes twice"
        if fault:
            raise DownloadError(f"the archive's {member.filename!r:.80} {fault}: nothing was unpacked")
        seen.add(member.filename.casefold())
    total = sum(member.file_size for member in members)
    if total > min(MAX_UNPACKED_BYTES, max(SMALL_BYTES, MAX_RATIO * packed_bytes)):
        raise DownloadError(
            f"the archive has {packed_bytes:,} bytes and would become {total:,}: that is no checkpoint; not unpacked"
        )


def _fault(member: zipfile.ZipInfo) -> str | None:
    path, mode = PurePosixPath(member.filename), member.external_attr >> 16
    if path.is_absolute() or "\\" in member.orig_filename or "\0" in member.orig_filename or ":" in member.filename:
        return "is no plain relative path"
    if not path.parts or ".." in path.parts:
        return "leads out of its folder"
    if stat.S_ISLNK(mode) or (mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way"
    return None


def _shared_folder(names: list[str]) -> str:
    """`folder/` where every name begins with it, else nothing."""
    tops = {name.partition("/")[0] for name in names if not name.startswith(IGNORED)}
    only = next(iter(tops), "")
    return f"{only}/" if len(tops) == 1 and all("/" in n for n in names if not n.startswith(IGNORED)) else ""


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with archive.open(member) as source, target.open("xb") as stream:
        while chunk := source.read(CHUNK_BYTES):  # the last one brings the check of the CRC
            left -= len(chunk)
            if left < 0:
                raise DownloadError(f"the archive's {member.filename!r:.80} is larger than it says: not unpacked")
            stream.write(chunk)
    if left:
        raise DownloadError(f"the archive's {member.filename!r:.80} is smaller than it says: fetch it again")
