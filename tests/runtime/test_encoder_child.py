"""The child's side of the encoder process: its errors, and the note on the Neural Engine at the first use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastvlm.models import compute_plan
from fastvlm.models.compute_plan import CPU, ENGINE, Place, Placement
from fastvlm.models.errors import FastVLMError, PackageError, UsageError
from fastvlm.runtime import encoder_child
from fastvlm.runtime.encoder_child import described, placement_notes
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import Shapes

SHAPES = Shapes(128, 3, hidden_size=6)


@pytest.mark.slow
def test_error_of_the_package_keeps_its_class(tmp_path: Path) -> None:
    with EncoderProcess(tmp_path / "none.mlpackage", SHAPES, backend="reference") as encoder:
        with pytest.raises(PackageError, match=r"none\.mlpackage: must be a .mlpackage folder"):
            encoder.wait_ready()
        with pytest.raises(FastVLMError, match=r"none\.mlpackage: must be a .mlpackage folder"):
            encoder.encode(np.zeros((1, 3, 128, 128), np.float32))


@pytest.mark.parametrize(
    ("error", "kind", "message", "arguments"),
    [
        (UsageError("fit must be 'pad'", "fit"), "UsageError", "fit must be 'pad'", ["fit"]),
        (MemoryError(), "MachineError", "out of memory", []),
        (RuntimeError("E5RT failed"), "PackageError", "the vision encoder failed: E5RT failed", []),
        (PackageError("x" * 5000), "PackageError", "x" * 2000, []),
    ],
    ids=["own", "memory", "other", "long"],
)
def test_error_is_described_by_class_message_and_arguments(
    error: Exception, kind: str, message: str, arguments: list[str]
) -> None:
    found = described(error)
    assert (found["kind"], found["arguments"]) == (kind, arguments)
    assert message in found["message"]
    assert len(found["message"]) <= 2000


def test_only_the_first_use_asks_for_the_engines_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def placement(compiled: Path, compute_units: str, *, seconds: float) -> Placement:
        asked.append((compute_units, seconds))
        return Placement((Place("x", "conv", ENGINE, 0.25), Place("y", "conv", CPU, 0.75)))

    monkeypatch.setattr(compute_plan, "placement", placement)
    compiled, stages = tmp_path / "a.mlmodelc", []
    old = SimpleNamespace(compiled=compiled, compile_ms=0.0)
    new = SimpleNamespace(compiled=compiled, compile_ms=900.0)
    assert placement_notes(old, "CPU_AND_NE", stages.append) == []
    (note,) = placement_notes(new, "CPU_AND_NE", stages.append)
    assert note.startswith("Core ML places 25% of the vision encoder's work on the Neural Engine")
    assert placement_notes(old, "CPU_AND_NE", stages.append) == [note]
    assert (asked, stages) == ([("CPU_AND_NE", encoder_child.PLAN_SECONDS)], ["plan"])
    assert placement_notes(new, "CPU_ONLY", stages.append) == []
