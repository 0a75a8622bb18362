"""The transport: messages in pieces, bytes that are not messages, and shared memory without overlaps."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from fastvlm.runtime.transport import (
    MAX_BYTES,
    SLOTS,
    FrameError,
    Frames,
    Layout,
    SharedMemory,
    packed,
    received,
    reserved_file,
    send,
)

MESSAGES = [{"id": 0, "package": "é"}, {}, {"id": 1, "list": [1.5, None]}]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_are_parsed_from_pieces_of_any_size(size: int) -> None:
    content, frames = b"".join(map(packed, MESSAGES)), Frames()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    assert [message for piece in pieces for message in frames.feed(piece)] == MESSAGES


@pytest.mark.parametrize(
    "content",
    [
        b"printed text",
        b"\xf6vl?",
        b"\xf6vlm" + (MAX_BYTES + 1).to_bytes(4, "big"),
        b"\xf6vlm\0\0\0\x02[]",
        b"\xf6vlm\0\0\0\x02{x",
        packed({"id": 1}) + b"x",
    ],
)
def test_frame_error_when_bytes_are_not_messages(content: bytes) -> None:
    with pytest.raises(FrameError, match="^got "):
        list(Frames().feed(content))


def test_messages_arrive_until_the_pipe_is_closed() -> None:
    reader, writer = os.pipe()
    for message in MESSAGES:
        send(writer, message)
    os.close(writer)
    assert list(received(reader)) == MESSAGES
    os.close(reader)


def test_slots_share_no_memory() -> None:
    layout = Layout(64, 5)
    descriptor = reserved_file(layout.total_bytes)
    assert os.fstat(descriptor).st_size == layout.total_bytes
    first, second = SharedMemory(layout, descriptor), SharedMemory(layout, descriptor)
    os.close(descriptor)
    for slot in range(SLOTS):
        first.pixels(slot)[...] = slot
        first.features(slot, (1, 5, 1))[...] = -slot - 1
    for slot in range(SLOTS):
        np.testing.assert_array_equal(second.pixels(slot), np.full((1, 3, 64, 64), slot, np.float32))
        np.testing.assert_array_equal(second.features(slot, (5,)), np.full(5, -slot - 1, np.float32))


def test_full_memory_is_one_clear_error() -> None:
    code = (
        "import resource, sys; from pathlib import Path; from fastvlm.runtime.encoder_process import EncoderProcess\n"
        "from fastvlm.runtime.encoders import Shapes; from fastvlm.models.errors import MachineError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: EncoderProcess(Path('x'), Shapes(128, 3, 6), program=('-c', ''))\n"
        "except MachineError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "bytes of shared memory cannot be reserved in memory (File too large). Free some space" in found.stdout
