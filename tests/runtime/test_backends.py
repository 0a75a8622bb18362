"""Backends: the default for each machine and folder, and the arguments that are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import MachineError, UsageError
from fastvlm.runtime import backends
from fastvlm.runtime.backends import open_encoder
from fastvlm.runtime.encoders import Shapes

SHAPES = Shapes(128, 3, hidden_size=6)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the encoders that would be started in a process."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(backends, "EncoderProcess", lambda *args, **options: calls.append(options) or "process")
    monkeypatch.setattr(backends, "ReferenceEncoder", lambda *args: "in process")
    monkeypatch.delenv("FASTVLM_COMPUTE_UNITS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("platform", "expected"), [("darwin", "process"), ("linux", "in process"), ("win32", "in process")]
)
def test_default_backend_follows_the_machine(
    platform: str, expected: str, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert open_encoder(Path("p"), None, SHAPES) == expected
    assert open_encoder(Path("p"), "reference", SHAPES) == "in process"
    assert open_encoder(Path("p"), "reference", SHAPES, None, True) == "process"
    assert started[-1]["backend"] == "reference"


def test_compute_units_come_from_argument_then_variable(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    open_encoder(Path("p"), "coreml", SHAPES)
    monkeypatch.setenv("FASTVLM_COMPUTE_UNITS", "CPU_ONLY")
    open_encoder(Path("p"), "coreml", SHAPES)
    open_encoder(Path("p"), "coreml", SHAPES, "ALL")
    assert [options["compute_units"] for options in started] == ["CPU_AND_NE", "CPU_ONLY", "ALL"]
    monkeypatch.setenv("FASTVLM_COMPUTE_UNITS", "ENGINE")
    with pytest.raises(UsageError, match="FASTVLM_COMPUTE_UNITS must be one of .*'ENGINE'"):
        open_encoder(Path("p"), "coreml", SHAPES)
    assert open_encoder(Path("p"), "reference", SHAPES) == "in process"


def test_compute_units_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="one of CPU_AND_NE, .*, got 'GPU'"):
        open_encoder(Path("p"), "coreml", SHAPES, "GPU")
    with pytest.raises(UsageError, match="compute_units needs backend='coreml', got backend='reference'"):
        open_encoder(Path("p"), "reference", SHAPES, "ALL")


def test_usage_error_when_the_backend_is_unknown() -> None:
    with pytest.raises(UsageError, match="'reference' or 'mlx', got 'cuda'"):
        open_encoder(Path("p"), "cuda", SHAPES)


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML works")
def test_machine_error_when_core_ml_is_chosen_off_a_mac(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="macOS only"):
        open_encoder(tmp_path, "coreml", SHAPES)
