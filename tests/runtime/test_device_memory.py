"""MLX and the memory that a GPU recommends: tested up to the calls, which need a Mac."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm.models import _mlx
from fastvlm.runtime.device_memory import bound_memory
from fastvlm.runtime.fastvlm import FastVLM


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU in place of the CPU; `calls` are the limits that were set."""
    found = SimpleNamespace(calls=[], info={"max_recommended_working_set_size": 10**9})
    monkeypatch.setattr(_mlx, "on_cpu", lambda: False)
    monkeypatch.setattr(_mlx.mx, "device_info", lambda: found.info)
    for name in ("set_memory_limit", "set_wired_limit"):
        monkeypatch.setattr(_mlx.mx, name, lambda limit, name=name: found.calls.append((name, limit)))
    return found


def test_mlx_keeps_within_what_the_device_recommends(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    assert bound_memory(vlm.language) == ()
    assert gpu.calls == [("set_memory_limit", 10**9), ("set_wired_limit", 10**9)]


def test_note_is_made_when_the_weights_do_not_fit(vlm: FastVLM, gpu: SimpleNamespace) -> None:
    gpu.info["max_recommended_working_set_size"] = 10**6
    (note,) = bound_memory(vlm.language)
    assert "--decoder-bits 4" in note


@pytest.mark.parametrize("info", [{}, {"max_recommended_working_set_size": 0}, {"architecture": "cuda"}], ids=str)
def test_nothing_is_set_where_nothing_is_recommended(vlm: FastVLM, gpu: SimpleNamespace, info: dict[str, Any]) -> None:
    gpu.info = info
    assert bound_memory(vlm.language) == ()
    assert gpu.calls == []


def test_nothing_is_set_on_a_cpu(vlm: FastVLM, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlx, "on_cpu", lambda: True)
    assert bound_memory(vlm.language) == ()
    assert gpu.calls == []
