"""Messages between this process and the encoder's: JSON objects on pipes, each with a mark and its length in front."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

MARK = b"\xf6vlm"
"""The first bytes of each message: text that something else prints never begins with them."""

MAX_BYTES = 2**16
"""Longest message in bytes: an order with two long paths takes under 10,000."""

_HEADER = struct.Struct(">4sI")


class FrameError(Exception):
    """Bytes that are not messages."""


def packed(message: Mapping[str, Any]) -> bytes:
    """The message with its mark and length."""
    content = json.dumps(message).encode()
    return _HEADER.pack(MARK, len(content)) + content


class Frames:
    """Takes bytes as they come and gives the messages that are complete."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The messages that `chunk` completes. Raises FrameError."""
        self._waiting += chunk
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> dict[str, Any] | None:
        waiting = self._waiting
        if waiting[: len(MARK)] != MARK[: len(waiting)]:
            raise FrameError(f"found {bytes(waiting[:24])!r}")
        if len(waiting) < _HEADER.size:
            return None
        _, length = _HEADER.unpack_from(waiting)
        if length > MAX_BYTES:
            raise FrameError(f"found a message of {length:,} bytes")
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
            raise FrameError(f"found {content[:24]!r}")
        return message


def received(descriptor: int) -> Iterator[dict[str, Any]]:
    """The messages from a pipe until its other end is closed. Raises FrameError."""
    frames = Frames()
    while chunk := os.read(descriptor, MAX_BYTES):
        yield from frames.feed(chunk)


def send(descriptor: int, message: Mapping[str, Any]) -> None:
    """Writes the whole message. Raises OSError."""
    content = packed(message)
    while content:
        content = content[os.write(descriptor, content) :]
