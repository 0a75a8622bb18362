"""The transport between this process and the encoder's: messages on pipes, pixels and features in shared memory.

A message is a JSON object on a pipe, with a mark and its length in front. The shared memory has no name, so the system
frees it with the last process that has it open, however that ends.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.errors import MachineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MARK = b"\xf6vlm"
"""The first bytes of each message. Printed text never starts with them."""

MAX_BYTES = 2**16
"""The longest message in bytes. A request with two long paths takes under 10,000."""

_HEADER = struct.Struct(">4sI")
"""The mark and the length of the content."""

SLOTS = 3
"""The number of images in shared memory: one whose answer starts, one that is encoded, and one that waits."""

_CHUNK_BYTES = 2**20
"""The number of bytes that are written at a time if the system cannot reserve space."""


class FrameError(Exception):
    """The bytes on a pipe are not messages."""


def packed(message: Mapping[str, Any]) -> bytes:
    """Returns a message with its mark and length."""
    content = json.dumps(message).encode()
    return _HEADER.pack(MARK, len(content)) + content


class Frames:
    """A parser of the bytes on a pipe into messages."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yields the messages that `chunk` completes. Raises FrameError."""
        self._waiting += chunk
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> dict[str, Any] | None:
        waiting = self._waiting
        if waiting[: len(MARK)] != MARK[: len(waiting)]:
            raise FrameError(f"got {bytes(waiting[:24])!r}")
        if len(waiting) < _HEADER.size:
            return None
        _, length = _HEADER.unpack_from(waiting)
        if length > MAX_BYTES:
            raise FrameError(f"got a message of {length:,} bytes")
        end = _HEADER.size + length
        if len(waiting) < end:
            return None
        content = bytes(waiting[_HEADER.size : end])
        del waiting[:end]
        try:
            message = json.loads(content)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise FrameError(f"got {content[:24]!r}")
        return message


def received(descriptor: int) -> Iterator[dict[str, Any]]:
    """Yields the messages from a pipe until its other end is closed. Raises FrameError."""
    frames = Frames()
    while chunk := os.read(descriptor, MAX_BYTES):
        yield from frames.feed(chunk)


def send(descriptor: int, message: Mapping[str, Any]) -> None:
    """Writes a whole message to a pipe. Raises OSError."""
    content = packed(message)
    while content:
        content = content[os.write(descriptor, content) :]


@dataclass(frozen=True)
class Layout:
    """The layout of the shared memory: `SLOTS` times pixels and features, in float32, each on its own pages."""

    image_size: int
    feature_count: int
    """The largest number of values that the features of an image can have."""

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """The shape of an image's pixels."""
        return 1, 3, self.image_size, self.image_size

    @property
    def pixel_bytes(self) -> int:
        """The size of an image's pixels, in whole pages."""
        return _whole_pages(4 * 3 * self.image_size**2)

    @property
    def slot_bytes(self) -> int:
        """The size of one image's pixels and features."""
        return self.pixel_bytes + _whole_pages(4 * self.feature_count)

    @property
    def total_bytes(self) -> int:
        """The size of all slots."""
        return SLOTS * self.slot_bytes


class SharedMemory:
    """Pixels and features of a few images, mapped from an open file."""

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        self._map = mmap.mmap(descriptor, layout.total_bytes)

    def pixels(self, slot: int) -> NDArray[np.float32]:
        """Returns the pixels of a slot, (1, 3, S, S) float32, without copying them."""
        start, shape = slot * self.layout.slot_bytes, self.layout.pixel_shape
        return np.frombuffer(self._map, np.float32, 3 * self.layout.image_size**2, start).reshape(shape)

    def features(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Returns the features of a slot, float32 of `shape`, without copying them."""
        start = slot * self.layout.slot_bytes + self.layout.pixel_bytes
        return np.frombuffer(self._map, np.float32, int(np.prod(shape)), start).reshape(shape)


def reserved_file(size: int) -> int:
    """Returns the descriptor of a file without a name whose `size` bytes are all reserved.

    Without the reservation, a write to a full disk or memory would end the process with SIGBUS.

    Raises:
        MachineError: the space cannot be reserved.
    """
    descriptor = -1
    try:
        descriptor = _nameless_file()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            for start in range(0, size, _CHUNK_BYTES):
                os.pwrite(descriptor, bytes(min(_CHUNK_BYTES, size - start)), start)
    except OSError as reason:
        if descriptor >= 0:
            os.close(descriptor)
        place = "memory" if hasattr(os, "memfd_create") else f"{tempfile.gettempdir()}"
        full = reason.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)
        raise MachineError(
            f"the vision encoder's process: {size:,} bytes of shared memory cannot be reserved in {place} "
            f"({reason.strerror}). {'Free some space' if full else 'Check its limits and permissions'}, "
            "or use a smaller image size."
        ) from None
    return descriptor


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastvlm")
    descriptor, path = tempfile.mkstemp(prefix="fastvlm-")
    os.unlink(path)  # noqa: PTH108 - as soon as possible
    return descriptor


def _whole_pages(size: int) -> int:
    page = mmap.PAGESIZE
    return -(-size // page) * page
