"""Programs with a thread for every question: MLX's own threads do not pile up."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models._mlx import mx, on_cpu
from fastvlm.models.errors import FastVLMError
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import Request, prepare
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


def requests() -> list[Request]:
    """Their answers end one after the other, so that a batch of them is cut."""
    options = {"ignore_eos": True, "temperature": 1.0, "seed": 1}
    return [prepare(PICTURE, "What?", max_tokens=count, **options) for count in (2, 4, 6)]


def ids(answers: Iterable[Generation | FastVLMError]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in answers if isinstance(one, Generation)]


def test_threads_that_ask_leave_none_behind(vlm: FastVLM) -> None:
    alone = ids(vlm.engine.stream(request).read() for request in requests())
    answers: list[list[tuple[int, ...]]] = []

    def ask() -> None:
        answers.append(ids(vlm.engine.stream(request).read() for request in requests()))
        answers.append(ids(Batch(vlm.engine).outcomes(requests())))

    in_new_threads(ask, 3)
    count = thread_count()
    in_new_threads(ask, 12)
    assert thread_count() < count + 12  # a thread for each would be left; torch's and Python's own come and go
    assert answers == [alone] * 30


def test_batch_goes_on_in_another_thread(vlm: FastVLM) -> None:
    alone = ids(vlm.engine.stream(request).read() for request in requests())
    batch, found = Batch(vlm.engine).outcomes(requests()), []
    for _ in range(3):
        in_new_threads(lambda: found.append(next(batch)), 1)
    assert ids(found) == alone


@pytest.mark.skipif(not hasattr(mx, "new_thread_unsafe_stream"), reason="this MLX's streams serve every thread")
def test_other_threads_share_one_stream_and_the_one_that_loads_keeps_its_own() -> None:
    found: list[mx.Stream] = []
    shared = SharedStream()

    def compute() -> None:
        with shared():
            found.append(mx.default_stream(mx.cpu))

    in_new_threads(compute, 3)
    assert found[0] == found[1] == found[2] != mx.default_stream(mx.cpu)
    assert isinstance(shared(), contextlib.nullcontext)
