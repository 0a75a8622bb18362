"""The names of constants in MLIR bytecode, the form of the program in an `.aimodel`.

Apple's compiler names a constant by a hash of its content. The hash begins with an address of the process, which the
system draws at random, so equal programs have other names in each run. `with_stable_names` replaces them by a hash
without that start. Nothing else in a program depends on the run.

The layout is MLIR's own (mlir.llvm.org, "MLIR Bytecode Format"), versions 1 to 6. A file is its magic number, a
version, the producer's name, and sections. Numbers are prefixed varints: the trailing zeros of the first byte count the
bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..models.errors import PackageError

MAGIC = b"ML\xefR"
VERSIONS = range(1, 7)

STRINGS, RESOURCES, RESOURCE_OFFSETS = 0, 5, 6
"""The ids of the sections that are read. The others are copied."""

ALIGNED = 0x80
"""The bit of a section's id that says that its body is aligned."""
PADDING = b"\xcb"
BLOB = 0
"""The kind of a resource that is a blob: its alignment, its size, padding, bytes."""

DRAWN_NAME = re.compile(rb"resource_\d+")
"""The names that the compiler makes from a hash."""


@dataclass(frozen=True)
class Section:
    """A section of a bytecode file."""

    id: int
    alignment: int | None
    """The alignment of the body in the file, in bytes."""
    body: bytes


class Reader:
    """Reads numbers, one after the other. Raises PackageError at the end of the data."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    @property
    def at_end(self) -> bool:
        """True if nothing is left."""
        return self.position >= len(self.data)

    def byte(self) -> int:
        """Returns the next byte."""
        return self.take(1)[0]

    def take(self, count: int) -> bytes:
        """Returns the next `count` bytes."""
        end = self.position + count
        if end > len(self.data):
            raise PackageError("the MLIR bytecode is truncated. Export the model again.")
        found, self.position = self.data[self.position : end], end
        return found

    def number(self) -> int:
        """Returns the next varint."""
        first = self.data[self.position] if not self.at_end else 0
        if first == 0:  # the prefix of a number of 64 bits
            return int.from_bytes(self.take(9)[1:], "little")
        length = (first & -first).bit_length()
        return int.from_bytes(self.take(length), "little") >> length

    def align(self, alignment: int) -> None:
        """Skips the padding in front of a multiple of `alignment`."""
        self.take(-self.position % alignment)


def varint(value: int) -> bytes:
    """Returns `value` as MLIR writes it."""
    length = max(1, -(-value.bit_length() // 7))
    if length > 8:
        return b"\0" + value.to_bytes(8, "little")
    return (value << length | 1 << length - 1).to_bytes(length, "little")


def read_sections(data: bytes) -> tuple[bytes, list[Section]]:
    """Returns what is in front of the sections, and the sections.

    Raises:
        PackageError: it is not MLIR bytecode, or of an unknown version.
    """
    reader, sections = Reader(data), []
    if reader.take(len(MAGIC)) != MAGIC or reader.number() not in VERSIONS:
        raise PackageError("the program is not MLIR bytecode of a known version. Install the pinned coreai-core.")
    while reader.byte():  # the producer's name
        pass
    head = data[: reader.position]
    while not reader.at_end:
        kind, size, alignment = reader.byte(), reader.number(), None
        if kind & ALIGNED:
            alignment = reader.number()
            reader.align(alignment)
        sections.append(Section(kind & ~ALIGNED, alignment, reader.take(size)))
    return head, sections


def written(head: bytes, sections: list[Section]) -> bytes:
    """Returns the file of the sections."""
    file = bytearray(head)
    for section in sections:
        file += bytes([section.id | (0 if section.alignment is None else ALIGNED)]) + varint(len(section.body))
        if section.alignment is not None:
            file += varint(section.alignment)
            file += PADDING * (-len(file) % section.alignment)
        file += section.body
    return bytes(file)


def read_strings(body: bytes) -> list[bytes]:
    """Returns the strings of their section. It has their lengths in reverse order first."""
    reader = Reader(body)
    lengths = [reader.number() for _ in range(reader.number())][::-1]
    return [reader.take(length)[:-1] for length in lengths]


def written_strings(strings: list[bytes]) -> bytes:
    """Returns the section of the strings."""
    lengths = [varint(len(string) + 1) for string in reversed(strings)]
    return varint(len(strings)) + b"".join(lengths) + b"".join(string + b"\0" for string in strings)


def read_resources(offsets: bytes, body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the place of each blob's name among the strings, and the blob, in the order of the file."""
    reader, begin = Reader(offsets), 0
    external, groups = reader.number(), 0
    while not reader.at_end:
        reader.number()  # the name of the external user, or the number of the dialect
        for _ in range(reader.number()):
            name, size, kind = reader.number(), reader.number(), reader.byte()
            if groups >= external and kind == BLOB:
                blob = Reader(body, begin)
                alignment, length = blob.number(), blob.number()
                blob.align(alignment)
                yield name, blob.take(length)
            begin += size
        groups += 1


def resources(data: bytes) -> list[tuple[str, bytes]]:
    """Returns the name and the bytes of every blob in a bytecode file. Raises PackageError."""
    sections = {section.id: section.body for section in read_sections(data)[1]}
    if RESOURCE_OFFSETS not in sections:
        return []
    strings = read_strings(sections[STRINGS])
    blobs = read_resources(sections[RESOURCE_OFFSETS], sections[RESOURCES])
    return [(strings[place].decode(), blob) for place, blob in blobs]


def with_stable_names(data: bytes) -> bytes:
    """Returns a bytecode file whose drawn names are hashes of the blobs alone. Raises PackageError."""
    head, sections = read_sections(data)
    bodies = {section.id: section.body for section in sections}
    if RESOURCE_OFFSETS not in bodies:
        return data
    strings, taken = read_strings(bodies[STRINGS]), set[bytes]()
    for place, blob in read_resources(bodies[RESOURCE_OFFSETS], bodies[RESOURCES]):
        if DRAWN_NAME.fullmatch(strings[place]):
            strings[place] = free_name(blob, taken)
    changed = written_strings(strings)
    return written(head, [replace(one, body=changed) if one.id == STRINGS else one for one in sections])


def free_name(blob: bytes, taken: set[bytes]) -> bytes:
    """Returns a name for a blob and adds it to `taken`: equal blobs of other types have names of their own."""
    number = int.from_bytes(hashlib.sha256(blob).digest()[:8], "little")
    while (name := b"resource_%d" % number) in taken:
        number = (number + 1) % 2**64
    taken.add(name)
    return name
