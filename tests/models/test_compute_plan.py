"""Reading a compute plan: the plan is made of coremltools' own classes, filled in as a Mac would."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastvlm.models import compute_plan
from fastvlm.models.compute_plan import CPU, ENGINE, UNKNOWN, Place, Placement, placement, places, read_placement
from fastvlm.models.errors import MachineError, PackageError
from fastvlm.models.versions import import_coremltools

pytestmark = pytest.mark.slow

OPERATIONS = [
    ("ios17.const", "weight", None, None),
    ("ios16.constexpr_affine_dequantize", "weight_2", None, None),
    ("ios17.cast", "x", "MLCPUComputeDevice", 0.05),
    ("ios17.conv", "y", "MLNeuralEngineComputeDevice", 0.7),
    ("ios17.conv", "z", "MLNeuralEngineComputeDevice", 0.2),
    ("ios17.transpose", "t", "MLCPUComputeDevice", 0.01),
    ("ios17.cast", "image_features", None, None),
]
"""Operator, result, preferred device and cost."""


def from_coremltools(module: str) -> ModuleType:
    """Returns a module of coremltools. It is imported late, because that takes seconds."""
    import_coremltools()
    return importlib.import_module(f"coremltools.models.{module}")


class FakePlan:
    """The plan of a Mac, in coremltools' structure."""

    def __init__(self, rows: list[tuple[str, str, str | None, float | None]], function: str = "main") -> None:
        self._plan = from_coremltools("compute_plan")
        self._rows = {}
        operations = []
        for kind, result, device, cost in rows:
            value = self._plan.MLModelStructureProgramNamedValueType(
                result, self._plan.MLModelStructureProgramValueType()
            )
            operations.append(self._plan.MLModelStructureProgramOperation({}, kind, [value], [], None))
            self._rows[result] = (device, cost)
        block = self._plan.MLModelStructureProgramBlock([], operations, [])
        program = self._plan.MLModelStructureProgram({function: self._plan.MLModelStructureProgramFunction([], block)})
        self.model_structure = self._plan.MLModelStructure(None, program, None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        device = self._rows[operation.outputs[0].name][0]
        if device is None:
            return None
        kind = getattr(from_coremltools("compute_device"), device)
        preferred = kind.__new__(kind)  # its own constructor wants a handle of Core ML's
        return self._plan.MLComputePlanDeviceUsage(preferred, [preferred])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        cost = self._rows[operation.outputs[0].name][1]
        return None if cost is None else self._plan.MLComputePlanCost(cost)


def planned(rows: list[tuple[str, str, str | None, float | None]] = OPERATIONS) -> Placement:
    return Placement(tuple(places(FakePlan(rows))))


def child(code: str) -> tuple[str, ...]:
    """The command of a process that runs `code` in place of Core ML's plan."""
    return sys.executable, "-c", code


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.4.1", ("", "", ""), "arm64"))


def test_every_operation_that_is_computed_has_its_place() -> None:
    found = planned()
    assert found.places == (
        Place("x", "cast", CPU, 0.05),
        Place("y", "conv", ENGINE, 0.7),
        Place("z", "conv", ENGINE, 0.2),
        Place("t", "transpose", CPU, 0.01),
        Place("image_features", "cast", UNKNOWN, 0.0),
    )
    assert [place.name for place in found.elsewhere] == ["x", "t", "image_features"]


def test_shares_are_of_the_estimated_cost() -> None:
    found = planned()
    assert list(found.cost_by_device) == [ENGINE, CPU, UNKNOWN]
    assert found.engine_share == pytest.approx(0.9 / 0.96)
    assert sum(found.cost_by_device.values()) == pytest.approx(1)
    assert found.as_dict()["engine_share"] == found.engine_share


def test_operations_count_alike_where_nothing_is_estimated() -> None:
    rows = [(kind, result, device, None) for kind, result, device, _ in OPERATIONS]
    assert planned(rows).engine_share == pytest.approx(2 / 5)


def test_plan_without_a_main_function_is_an_error() -> None:
    with pytest.raises(PackageError, match="that of an ML Program"):
        list(places(FakePlan(OPERATIONS, function="other")))


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML plans")
def test_placement_off_a_mac_is_one_line() -> None:
    with pytest.raises(MachineError, match="only macOS can tell"):
        placement(Path("a.mlmodelc"))


@pytest.mark.usefixtures("on_a_mac")
def test_macos_without_compute_plans_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.3", ("", "", ""), "arm64"))
    with pytest.raises(MachineError, match=r"needs macOS 14\.4 or newer \(got 14\.3\)"):
        placement(Path("a.mlmodelc"), command=child("raise SystemExit"))


@pytest.mark.usefixtures("on_a_mac")
def test_placement_comes_from_another_process() -> None:
    code = "import sys, json; print(json.dumps({'places': [[*sys.argv[1:], 'neural engine', 1]]}))"
    found = placement(Path("a.mlmodelc"), "ALL", child(code))
    assert found.places == (Place("a.mlmodelc", "ALL", ENGINE, 1.0),)


ENDINGS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGABRT)": (MachineError, "_AND_NE: its .* crashed with SIGABRT$"),
    r"import sys; sys.stderr.write('MLIR failed\n'); sys.exit(3)": (MachineError, "exit code 3: MLIR failed$"),
    "pass": (MachineError, "exit code 0: it printed nothing$"),
    "print('{')": (MachineError, "exit code 0"),
    "print('[]')": (MachineError, "exit code 0"),
    """print('{"places": [[1]]}')""": (MachineError, "exit code 0"),
    r"import sys; sys.stdout.buffer.write(b'\xff' * 9)": (MachineError, "exit code 0"),
    "import time; time.sleep(60)": (MachineError, "no compute plan within 2 s on CPU_AND_NE"),
    """print('{"error": "PackageError", "message": "no plan"}')""": (PackageError, "^no plan$"),
    """print('{"error": "MachineError", "message": "no tools"}')""": (MachineError, "^no tools$"),
}


@pytest.mark.usefixtures("on_a_mac")
@pytest.mark.parametrize("code", ENDINGS)
def test_process_without_a_plan_is_one_line(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, message = ENDINGS[code]
    monkeypatch.setattr(compute_plan, "PLAN_SECONDS", 2 if "sleep" in code else 60)
    with pytest.raises(kind, match=message) as caught:
        placement(Path("a.mlmodelc"), command=child(code))
    assert "\n" not in str(caught.value)


def test_core_ml_is_asked_for_the_compute_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, core_ml_error: Callable[[str], RuntimeError]
) -> None:
    import coremltools

    asked: list[tuple[str, Any]] = []

    def load(path: str, compute_units: Any) -> FakePlan:
        asked.append((path, compute_units))
        return FakePlan(OPERATIONS)

    monkeypatch.setattr(from_coremltools("compute_plan").MLComputePlan, "load_from_path", load)
    compiled = tmp_path / "fastvithd.mlmodelc"
    assert read_placement(compiled, "ALL") == planned()
    assert asked == [(str(compiled), coremltools.ComputeUnit.ALL)]

    def fails(path: str, compute_units: Any) -> FakePlan:
        raise core_ml_error("Failed to build the plan.")

    monkeypatch.setattr(from_coremltools("compute_plan").MLComputePlan, "load_from_path", fails)
    with pytest.raises(PackageError, match=r"cannot plan for fastvithd\.mlmodelc: Failed to build the plan\.$"):
        read_placement(compiled, "CPU_AND_NE")


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML plans")
def test_real_process_replies_with_its_error(tmp_path: Path) -> None:
    command = [*compute_plan.COMMAND[:-1], "fastvlm.models.compute_plan", str(tmp_path / "a.mlmodelc"), "ALL"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reply = json.loads(done.stdout)
    assert reply["error"] == "PackageError"
    assert reply["message"].startswith("Core ML cannot plan for a.mlmodelc: ")
