"""Programs with a thread for every question: MLX's own threads do not pile up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models._mlx import on_cpu
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.shared_stream import SharedStream

TASKS = Path("/proc/self/task")
PICTURE = np.full((40, 60, 3), 77, np.uint8)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not on_cpu(), reason="counts the threads behind MLX's streams on a CPU"
)


def thread_count() -> int:
    return len(list(TASKS.iterdir()))


def in_new_threads(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()


def test_threads_that_ask_leave_none_behind(vlm: FastVLM) -> None:
    options = {"max_tokens": 3, "temperature": 1.0, "seed": 1}
    alone = vlm.generate(PICTURE, "What?", **options).token_ids
    answers: list[tuple[int, ...]] = []

    def ask() -> None:
        answers.append(vlm.generate(PICTURE, "What?", **options).token_ids)
        answers.extend(one.token_ids for one in vlm.generate_batch([PICTURE, PICTURE], "What?", **options))

    in_new_threads(ask, 3)
    count = thread_count()
    in_new_threads(ask, 12)
    assert thread_count() <= count + 2  # torch's and Python's own come and go
    assert set(answers) == {alone}


def test_thread_that_loads_keeps_its_own_stream() -> None:
    found = []
    shared = SharedStream()
    for _ in range(2):
        in_new_threads(lambda: found.append(shared()), 1)
    own = shared()
    assert type(own) is not type(found[0])
