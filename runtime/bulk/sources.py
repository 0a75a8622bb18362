"""The images of a run: folders, patterns, lists, zip and tar archives and tables, read lazily under stable keys."""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...models.errors import ImageError, UsageError
from ...models.images import MAX_IMAGE_BYTES, SUFFIXES
from .tables import TABLE_SUFFIXES, arrow_files, is_data_set, table_items

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES, *TABLE_SUFFIXES)
"""The suffixes of files that hold many images."""

MAX_PATH_BYTES = 2**16
"""The longest line of a list of images, in bytes."""


@dataclass(frozen=True)
class Item:
    """An image that was found, and its name in the results."""

    key: str
    """The relative path: below the folder that was named, or the archive as it was named and the name inside it."""
    load: Callable[[], Path | bytes]
    """Returns the file, or the bytes of the image. Call it before the next item is taken. Raises ImageError."""


class Source:
    """The images of some inputs, in a stable order, none of which is held in memory.

    An input is a folder (with its subfolders), an image, a zip or tar archive, a parquet file, a folder written by
    `save_to_disk` of `datasets`, or a glob pattern of such. `listed` is a file of paths, one per line, or `-` for
    stdin. `shard` is (K, N): the Kth of N parts, which depend on keys alone. `column` has the images of tables.

    Sorting holds the names of one folder, or the hits of one pattern. A zip file's directory is held as well.

    Raises:
        UsageError: nothing was named, or the shard is not one of N.
        ImageError: (here, or while iterating) an input does not exist, or cannot be read.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path] = (),
        listed: Path | None = None,
        shard: tuple[int, int] = (1, 1),
        column: str | None = None,
    ) -> None:
        if not inputs and listed is None:
            raise UsageError("no images were named. Name folders, images, archives or a list")
        part, parts = shard
        if not 1 <= part <= parts:
            raise UsageError(f"shard must be K/N with K from 1 to N (got {part}/{parts})", "shard")
        self._inputs, self._listed, self._shard, self._column = [str(name) for name in inputs], listed, shard, column
        for name in self._inputs:
            if not Path(name).exists() and not glob.has_magic(name):
                raise ImageError(f"{name} does not exist. Name a folder, an image, an archive or a pattern.")
        if listed is not None and str(listed) != "-" and not listed.is_file():
            raise ImageError(f"{listed} is not a file. Name a list of images, one per line.")

    def __iter__(self) -> Iterator[Item]:
        """Yields the images of this shard."""
        part, parts = self._shard
        return (item for item in self._all() if parts == 1 or part_of(item.key, parts) == part)

    def count(self) -> int | None:
        """Returns about how many images there are, or None if that takes reading a whole tar archive or stdin."""
        unknown = str(self._listed) == "-" or any(glob.has_magic(name) for name in self._inputs)
        if unknown or any(name.endswith(TAR_SUFFIXES) for name in self._inputs):
            return None
        return sum(1 for _ in self._all()) // self._shard[1]

    def _all(self) -> Iterator[Item]:
        alone = len(self._inputs) == 1 and self._listed is None
        for name in self._inputs:
            if Path(name).exists():
                yield from self._found(
                    Path(name), "" if alone and Path(name).is_dir() else PurePosixPath(name).as_posix()
                )
                continue
            base = fixed_part(name)
            hits = sorted(glob.iglob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute one)
            if not hits:
                raise ImageError(f"{name} matches nothing. Quote the pattern, or correct it.")
            for hit in hits:
                yield from self._found(Path(hit), label(Path(hit).relative_to(base)))
        if self._listed is not None:
            yield from listed_items(self._listed)

    def _found(self, path: Path, name: str) -> Iterator[Item]:
        """Yields the images of an input, whose keys begin with `name`."""
        suffixes = path.name.lower()
        if path.is_dir() and is_data_set(path):
            for split, files in arrow_files(path):
                yield from _made(table_items(files, "/".join(filter(None, (name, split))), self._column))
        elif path.is_dir():
            yield from folder_items(path, name)
        elif suffixes.endswith(".zip"):
            yield from zip_items(path, name)
        elif suffixes.endswith(TAR_SUFFIXES):
            yield from tar_items(path, name)
        elif suffixes.endswith(TABLE_SUFFIXES):
            yield from _made(table_items([path], name, self._column))
        else:
            yield Item(name, lambda: path)


def part_of(key: str, parts: int) -> int:
    """Returns which of `parts` shards a key belongs to, from 1. It does not depend on other keys."""
    digest = hashlib.blake2b(key.encode(errors="backslashreplace"), digest_size=8, person=b"shard").digest()
    return int.from_bytes(digest, "little") % parts + 1


def fixed_part(pattern: str) -> Path:
    """Returns the folder above the first part of a pattern with a wildcard."""
    parts = Path(pattern).parts
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def folder_files(folder: Path) -> Iterator[Path]:
    """Yields the images in a folder and its subfolders by suffix, without hidden ones, in the order of their names."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(entry.name for entry in found if not entry.name.startswith("."))
    except OSError as reason:
        raise ImageError(f"{folder} cannot be read: {reason.strerror}.") from None
    for name in entries:
        path = folder / name
        if path.is_dir():
            if not path.is_symlink():  # a link to a folder above would never end
                yield from folder_files(path)
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def folder_items(folder: Path, name: str) -> Iterator[Item]:
    """Yields the images of a folder. Raises ImageError if there are none."""
    path = None
    for path in folder_files(folder):
        key = label(path.relative_to(folder))
        yield Item(f"{name}/{key}" if name else key, lambda path=path: path)  # type: ignore[misc]
    if path is None:
        raise ImageError(f"{folder} has no images. Their names must end in one of {' '.join(SUFFIXES)}.")


def listed_items(listed: Path) -> Iterator[Item]:
    """Yields the images of a list of paths, relative to the working directory, under the paths as they stand."""
    stdin = str(listed) == "-"
    with open(0, "rb", closefd=False) if stdin else listed.open("rb") as file:
        number = 0
        while line := file.readline(MAX_PATH_BYTES):
            number += 1
            if len(line) == MAX_PATH_BYTES:
                raise ImageError(f"{listed}: line {number} is not a path: it has {MAX_PATH_BYTES:,} bytes or more.")
            if name := line.rstrip(b"\r\n"):
                path = Path(os.fsdecode(name))
                yield Item(label(path), lambda path=path: path)  # type: ignore[misc]


def zip_items(path: Path, name: str) -> Iterator[Item]:
    """Yields the images of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if is_image(info.filename):
                    yield Item(f"{name}/{info.filename}", _zipped(archive, info, path))
    except (zipfile.BadZipFile, OSError) as reason:
        raise ImageError(f"{path} cannot be read as a zip archive: {reason}.") from None


def _zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Callable[[], bytes]:
    def load() -> bytes:
        check_image_size(info.file_size, info.filename)
        try:
            return archive.read(info)
        except Exception as reason:  # damaged, encrypted or compressed in another way
            raise ImageError(f"{info.filename} of {path} cannot be read: {reason}") from None

    return load


def tar_items(path: Path, name: str) -> Iterator[Item]:
    """Yields the images of a tar archive, such as a webdataset shard, in one pass."""
    try:
        with tarfile.open(path) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if member.isfile() and is_image(member.name):
                    yield Item(f"{name}/{label(Path(member.name))}", _tarred(archive, member))
    except (tarfile.TarError, EOFError, OSError) as reason:
        raise ImageError(f"{path} cannot be read as a tar archive: {reason}.") from None


def _tarred(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def load() -> bytes:
        check_image_size(member.size, member.name)
        stream = archive.extractfile(member)
        assert stream is not None
        return stream.read()

    return load


def is_image(member: str) -> bool:
    """Returns whether a name inside an archive is that of an image that is not hidden."""
    path = PurePosixPath(member)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts


def check_image_size(size: int, name: str) -> None:
    """Raises ImageError for an image of too many bytes."""
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"{name} must have at most {MAX_IMAGE_BYTES:,} bytes (got {size:,}).")


def _made(found: Iterable[tuple[str, Callable[[], Path | bytes]]]) -> Iterator[Item]:
    return (Item(key, load) for key, load in found)


def label(path: Path) -> str:
    """Returns a path as a string, with bytes that are not UTF-8 escaped."""
    return path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
