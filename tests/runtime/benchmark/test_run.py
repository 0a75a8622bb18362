"""The benchmark of several folders, and the process of each measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm.models.errors import ImageError, MachineError, ModelFolderError
from fastvlm.runtime.benchmark.run import benchmark, measure_isolated
from fastvlm.runtime.benchmark.workload import Workload


def test_bad_image_fails_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        benchmark(tmp_path / "nothing", Workload(image=tmp_path / "no.png"))


def test_error_of_the_process_is_raised_again(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        measure_isolated(tmp_path / "nothing", Workload())


def test_killed_or_failed_process_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastvlm.runtime.benchmark import run

    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 9)"))
    with pytest.raises(MachineError, match="measuring process: killed, probably out of memory"):
        measure_isolated(tmp_path, Workload())
    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", "raise SystemExit('first\\nlast words')"))
    with pytest.raises(MachineError, match=r"exit code 1 \(last words\)"):
        measure_isolated(tmp_path, Workload())
