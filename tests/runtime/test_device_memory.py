"""MLX and the memory that a GPU recommends: tested up to the calls, which need a Mac."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm.models import _mlx
from fastvlm.runtime.device_memory import CACHE_BYTES, HEADROOM_BYTES, DeviceMemory
from fastvlm.runtime.fastvlm import FastVLM

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
    """A GPU in place of the CPU; `calls` are those that set its memory."""
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
