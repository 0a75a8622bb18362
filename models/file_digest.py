"""Whether a file is the one that a manifest lists: all of it, or so much as costs nothing at each load."""

from __future__ import annotations

import hashlib
from pathlib import Path

SPANS = 16
SPAN_BYTES = 8192


def sha256(path: Path) -> str:
    """Of all bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sample_sha256(path: Path) -> str:
    """Of the size and of 16 spans of 8 KiB, spread from the first byte to the last, in hex.

    Two exports of different weights have files of the same sizes: this tells them apart in a millisecond, where
    hashing gigabytes takes seconds. It does not see a change between the spans.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        for span in range(SPANS):
            stream.seek(max(0, size - SPAN_BYTES) * span // (SPANS - 1))
            digest.update(stream.read(SPAN_BYTES))
    return digest.hexdigest()
