"""The child process: its replies, its ending, and that it never outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fastvlm.runtime.child_process import ChildProcess, Ending, Reply
from fastvlm.runtime.encoders import Shapes
from fastvlm.runtime.transport import SLOTS, Layout

from .processes import BAD_CHILD, is_running, until

SHAPES = Shapes(128, 3, hidden_size=6)
LAYOUT = Layout(128, 4 * 6)
OPENING = {"id": 0, "layout": [128, 24], "shapes": [128, 3, 6]}

PARENT = """
import sys, time
from pathlib import Path
import numpy as np
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import Shapes
fault, when = sys.argv[2:4]
encoder = EncoderProcess(Path("x"), Shapes(128, 3, 6), program=(sys.argv[1], fault, when, "-"))
print(encoder.pid, flush=True)
encoder.encode(np.zeros((1, 3, 128, 128), np.float32))
print("encoded", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["load", "1", "never"])
def test_child_ends_when_its_parent_is_killed(when: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(BAD_CHILD), "hang", when], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if when == "never":
        assert parent.stdout.readline() == "encoded\n"
    else:
        time.sleep(1.0)  # it hangs in native code, which holds the GIL
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert until(lambda: not is_running(pid), 2.0)


@pytest.fixture
def start() -> Iterator[Callable[..., ChildProcess]]:
    """A function that starts a child, such as `start("segv", "load")`. All are ended after the test."""
    started: list[ChildProcess] = []

    def start(fault: str = "none", when: str = "never") -> ChildProcess:
        started.append(ChildProcess((str(BAD_CHILD), fault, when, "-"), LAYOUT, SHAPES, OPENING))
        return started[-1]

    yield start
    for process in started:
        process.end()


def settled(reply: Reply) -> object:
    """Returns the outcome of a reply once it has one."""
    reply.wait(60.0)
    return reply.outcome


def test_requests_are_answered_in_the_shared_memory(start: Callable[..., ChildProcess]) -> None:
    process = start()
    assert settled(process.opening)["open_ms"] == 1.0
    assert process.stage is not None and process.stage[0] == "open"
    assert process.free_slots.qsize() == SLOTS
    slot = process.free_slots.get()
    process.memory.pixels(slot)[...] = 0.5
    reply = Reply(1, slot)
    process.request(reply, {"id": 1, "slot": slot})
    np.testing.assert_array_equal(settled(reply), np.full((1, 4, 3), 0.5, np.float32))
    assert process.working_since is None
    assert process.free_slots.qsize() == SLOTS


def test_ending_names_the_signal_and_the_last_output(start: Callable[..., ChildProcess]) -> None:
    process = start("abort", "load")
    assert settled(process.opening) == Ending("signal", number=signal.SIGABRT, loading=True)
    assert process.last_output == "MPSGraph: error: MLIR pass manager failed"


def test_request_after_the_end_is_settled_as_innocent(start: Callable[..., ChildProcess]) -> None:
    process = start()
    settled(process.opening)
    pid = process.pid
    process.end()
    reply = Reply(1, 0)
    process.request(reply, {"id": 1, "slot": 0})
    assert settled(reply) == Ending("closed")
    assert reply.innocent
    assert pid is not None and not is_running(pid)
