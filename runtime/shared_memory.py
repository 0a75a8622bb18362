"""Memory that two processes share and that has no name: the system frees it with the last of them, however they end."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..models.errors import MachineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SLOTS = 3
"""Images at a time: one whose answer begins, one that is encoded meanwhile, and one that waits for it."""

_ZEROS = 2**20
"""Bytes written at a time where the system cannot reserve space."""


@dataclass(frozen=True)
class Layout:
    """Where pixels and features lie: `SLOTS` times both, in float32, each on pages of its own."""

    image_size: int
    feature_count: int
    """Most numbers that the features of an image can have."""

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        return 1, 3, self.image_size, self.image_size

    @property
    def pixel_bytes(self) -> int:
        return _whole_pages(4 * 3 * self.image_size**2)

    @property
    def slot_bytes(self) -> int:
        return self.pixel_bytes + _whole_pages(4 * self.feature_count)

    @property
    def total_bytes(self) -> int:
        return SLOTS * self.slot_bytes


class SharedMemory:
    """The pixels and features of a few images, mapped from an open file."""

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        self._map = mmap.mmap(descriptor, layout.total_bytes)

    def pixels(self, slot: int) -> NDArray[np.float32]:
        """(1, 3, S, S) float32 of a slot; not a copy."""
        start, shape = slot * self.layout.slot_bytes, self.layout.pixel_shape
        return np.frombuffer(self._map, np.float32, 3 * self.layout.image_size**2, start).reshape(shape)

    def features(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """float32 of `shape` of a slot; not a copy."""
        start = slot * self.layout.slot_bytes + self.layout.pixel_bytes
        return np.frombuffer(self._map, np.float32, int(np.prod(shape)), start).reshape(shape)


def reserved_file(size: int) -> int:
    """A descriptor of a file of `size` bytes without a name, all of them reserved.

    Without the reservation, a write to a full disk or memory would end the process with SIGBUS.

    Raises:
        MachineError: there is no space.
    """
    descriptor = -1
    try:
        descriptor = _nameless_file()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            for start in range(0, size, _ZEROS):
                os.pwrite(descriptor, bytes(min(_ZEROS, size - start)), start)
    except OSError as reason:
        if descriptor >= 0:
            os.close(descriptor)
        place = "memory" if hasattr(os, "memfd_create") else f"{tempfile.gettempdir()}"
        full = reason.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)
        raise MachineError(
            f"the vision encoder's process: {size:,} bytes of shared memory cannot be reserved in {place} "
            f"({reason.strerror}). {'Free some space' if full else 'Check its limits and permissions'}, "
            "or use a smaller image size"
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
