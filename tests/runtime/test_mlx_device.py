"""MLX's device: calls for a GPU's memory, which need a Mac, and the streams of a program with many threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastvlm.models import _mlx
from fastvlm.models._mlx import mx, on_cpu
from fastvlm.models.errors import FastVLMError
from fastvlm.runtime.batch import Batch
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.mlx_device import CACHE_BYTES, HEADROOM_BYTES, DeviceMemory, SharedStream
from fastvlm.runtime.request import Request, prepare

M1_8GB = {
    "resource_limit": 499000,
    "max_recommended_working_set_size": 5726623061,
    "architecture": "applegpu_g13g",
    "memory_size": 8589934592,
    "max_buffer_length": 4294967296,
    "device_name": "Apple M1",
}
"""The keys of `mx.device_info()` on Metal."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, computing_on: Callable) -> SimpleNamespace:
    """A GPU in place of the CPU, with the `calls` that set its memory."""
    found = SimpleNamespace(calls=[], info=dict(M1_8GB))
    computing_on("gpu")
    monkeypatch.setattr(_mlx.mx, "device_info", lambda: found.info)
    for name in ("set_memory_limit", "set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(_mlx.mx, name, lambda limit, name=name: found.calls.append((name, limit)))
    monkeypatch.setattr(_mlx.mx, "clear_cache", lambda: found.calls.append(("clear_cache",)))
    return found


def weight_bytes(vlm: FastVLM) -> int:
    return sum(array.nbytes for _, array in _mlx.nn.utils.tree_flatten(vlm.engine.language.parameters()))


def test_freed_buffers_are_bounded_and_nothing_is_wired_at_load(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    assert DeviceMemory(vlm.engine.language).notes == ()
    assert gpu.calls == [("set_cache_limit", CACHE_BYTES)]


def test_weights_are_wired_until_the_last_answer_ends(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    memory = DeviceMemory(vlm.engine.language)
    gpu.calls.clear()
    wired = [("set_wired_limit", weight_bytes(vlm) + HEADROOM_BYTES)]
    with memory.in_use():
        with memory.in_use():
            assert gpu.calls == wired
        assert gpu.calls == wired
    assert gpu.calls == [*wired, ("clear_cache",), ("set_wired_limit", 0)]
    with pytest.raises(KeyError), memory.in_use():
        raise KeyError
    assert gpu.calls[3:] == [*wired, ("clear_cache",), ("set_wired_limit", 0)]


def test_no_more_is_wired_than_the_device_recommends(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    gpu.info["max_recommended_working_set_size"] = weight_bytes(vlm) + 1000
    with DeviceMemory(vlm.engine.language).in_use():
        assert gpu.calls[1:] == [("set_wired_limit", weight_bytes(vlm) + 1000)]


def test_answers_are_computed_with_the_weights_wired(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    model = FastVLM(vlm.folder, vlm.engine.encoder, vlm.engine.language, vlm.engine.tokenizer, 1.0)
    gpu.calls.clear()
    around = [
        ("set_wired_limit", weight_bytes(vlm) + HEADROOM_BYTES),
        ("clear_cache",),  # the prompt's activations
        ("clear_cache",),
        ("set_wired_limit", 0),
    ]
    model.generate(None, "Hi", max_tokens=3)
    assert gpu.calls == around
    model.generate_batch([None, None], "Hi", max_tokens=3)
    assert gpu.calls[4:] == [around[0], around[1], *around[1:]]
    gpu.calls.clear()
    pieces = model.stream(None, "Hi", max_tokens=30, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert gpu.calls == around


def test_note_is_made_when_the_weights_do_not_fit(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    gpu.info["max_recommended_working_set_size"] = 10**6
    (note,) = DeviceMemory(vlm.engine.language).notes
    assert "--decoder-bits 4" in note


@pytest.mark.parametrize("info", [{}, {"max_recommended_working_set_size": 0}, {"architecture": "cuda"}], ids=str)
def test_nothing_is_set_where_nothing_is_recommended(vlm: FastVLM, gpu: SimpleNamespace, info: dict[str, Any]) -> None:
    gpu.info = info
    memory = DeviceMemory(vlm.engine.language)
    with memory.in_use():
        memory.after_prefill()
    assert (gpu.calls, memory.notes) == ([], ())


def test_nothing_is_set_on_a_cpu(vlm: FastVLM, gpu: SimpleNamespace, computing_on: Callable) -> None:
    computing_on("cpu")
    memory = DeviceMemory(vlm.engine.language)
    with memory.in_use():
        memory.after_prefill()
    assert (gpu.calls, memory.notes) == ([], ())


TASKS = Path("/proc/self/task")
PICTURE = np.full((40, 60, 3), 77, np.uint8)

counts_threads = pytest.mark.skipif(
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
    """Returns requests whose answers have different lengths."""
    options = {"ignore_eos": True, "temperature": 1.0, "seed": 1}
    return [prepare(PICTURE, "What?", max_tokens=count, **options) for count in (2, 4, 6)]


def ids(answers: Iterable[Generation | FastVLMError]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in answers if isinstance(one, Generation)]


@pytest.mark.slow
@counts_threads
def test_new_threads_leave_no_mlx_threads_behind(vlm: FastVLM) -> None:
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


@counts_threads
def test_batch_resumes_in_another_thread(vlm: FastVLM) -> None:
    alone = ids(vlm.engine.stream(request).read() for request in requests())
    batch, found = Batch(vlm.engine).outcomes(requests()), []
    for _ in range(3):
        in_new_threads(lambda: found.append(next(batch)), 1)
    assert ids(found) == alone


@counts_threads
@pytest.mark.skipif(not hasattr(mx, "new_thread_unsafe_stream"), reason="this MLX's streams serve every thread")
def test_all_threads_share_a_stream() -> None:
    found: list[mx.Stream] = []
    shared = SharedStream()

    def compute() -> None:
        with shared():
            found.append(mx.default_stream(mx.cpu))

    compute()
    in_new_threads(compute, 3)
    assert found == [found[0]] * 4
    assert found[0] != mx.default_stream(mx.cpu)


@counts_threads
def test_warm_up_leaves_no_mlx_threads_behind(vlm: FastVLM) -> None:
    vlm.engine.warm_up()
    count = thread_count()
    in_new_threads(vlm.engine.warm_up, 4)
    assert thread_count() < count + 4
