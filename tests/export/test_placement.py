"""Reading a compute plan: the plan is made of coremltools' own classes, filled in as a Mac would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastvlm.export.placement import CPU, ENGINE, UNKNOWN, Place, placement
from fastvlm.models._coremltools import import_coremltools
from fastvlm.models.errors import MachineError, PackageError

import_coremltools()
from coremltools.models import compute_plan as ct_plan  # noqa: E402
from coremltools.models.compute_device import MLCPUComputeDevice, MLNeuralEngineComputeDevice  # noqa: E402

OPERATIONS = [
    ("ios17.const", "weight", None, None),
    ("ios16.constexpr_affine_dequantize", "weight_2", None, None),
    ("ios17.cast", "x", MLCPUComputeDevice, 0.05),
    ("ios17.conv", "y", MLNeuralEngineComputeDevice, 0.7),
    ("ios17.conv", "z", MLNeuralEngineComputeDevice, 0.2),
    ("ios17.transpose", "t", MLCPUComputeDevice, 0.01),
    ("ios17.cast", "image_features", None, None),
]
"""Operator, result, preferred device and cost."""


class FakePlan:
    """What a Mac answers; the structure around it is coremltools'."""

    def __init__(self, rows: list[tuple[str, str, type | None, float | None]], function: str = "main") -> None:
        self._rows = {}
        operations = []
        for kind, result, device, cost in rows:
            value = ct_plan.MLModelStructureProgramNamedValueType(result, ct_plan.MLModelStructureProgramValueType())
            operations.append(ct_plan.MLModelStructureProgramOperation({}, kind, [value], [], None))
            self._rows[result] = (device, cost)
        block = ct_plan.MLModelStructureProgramBlock([], operations, [])
        program = ct_plan.MLModelStructureProgram({function: ct_plan.MLModelStructureProgramFunction([], block)})
        self.model_structure = ct_plan.MLModelStructure(None, program, None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        device = self._rows[operation.outputs[0].name][0]
        if device is None:
            return None
        preferred = device.__new__(device)  # its own constructor wants a handle of Core ML's
        return ct_plan.MLComputePlanDeviceUsage(preferred, [preferred])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        cost = self._rows[operation.outputs[0].name][1]
        return None if cost is None else ct_plan.MLComputePlanCost(cost)


class FakePlans:
    def __init__(self, plan: FakePlan) -> None:
        self.plan = plan

    @contextmanager
    def open(self, package: Path) -> Iterator[FakePlan]:
        yield self.plan


def test_every_operation_that_is_computed_has_its_place() -> None:
    found = placement(Path("a.mlpackage"), FakePlans(FakePlan(OPERATIONS)))
    assert found.places == (
        Place("x", "cast", CPU, 0.05),
        Place("y", "conv", ENGINE, 0.7),
        Place("z", "conv", ENGINE, 0.2),
        Place("t", "transpose", CPU, 0.01),
        Place("image_features", "cast", UNKNOWN, 0.0),
    )
    assert [place.name for place in found.elsewhere] == ["x", "t", "image_features"]


def test_shares_are_of_the_estimated_cost() -> None:
    found = placement(Path("a.mlpackage"), FakePlans(FakePlan(OPERATIONS)))
    assert list(found.cost_by_device) == [ENGINE, CPU, UNKNOWN]
    assert found.engine_share == pytest.approx(0.9 / 0.96)
    assert sum(found.cost_by_device.values()) == pytest.approx(1)
    assert found.as_dict()["engine_share"] == found.engine_share


def test_operations_count_alike_where_nothing_is_estimated() -> None:
    rows = [(kind, result, device, None) for kind, result, device, _ in OPERATIONS]
    assert placement(Path("a.mlpackage"), FakePlans(FakePlan(rows))).engine_share == pytest.approx(2 / 5)


def test_plan_without_a_main_function_is_an_error() -> None:
    with pytest.raises(PackageError, match="not one of an ML Program"):
        placement(Path("a.mlpackage"), FakePlans(FakePlan(OPERATIONS, function="other")))


@pytest.mark.skipif(sys.platform == "darwin", reason="here Core ML plans")
def test_placement_off_a_mac_is_one_line() -> None:
    with pytest.raises(MachineError, match="only macOS can tell"):
        placement(Path("a.mlpackage"))


def test_core_ml_is_asked_for_the_neural_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, core_ml_error: Callable[[str], RuntimeError]
) -> None:
    import coremltools
    import coremltools.models.utils as utils

    asked: list[tuple] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(utils, "compile_model", lambda source, destination: Path(destination).mkdir())

    def load(path: str, compute_units: Any) -> FakePlan:
        asked.append((Path(path).name, Path(path).is_dir(), compute_units))
        return FakePlan(OPERATIONS)

    monkeypatch.setattr(ct_plan.MLComputePlan, "load_from_path", load)
    found = placement(tmp_path / "fastvithd.mlpackage")
    assert asked == [("fastvithd.mlmodelc", True, coremltools.ComputeUnit.CPU_AND_NE)]
    assert found.engine_share > 0.9

    def fails(source: str, destination: str) -> None:
        raise core_ml_error("Failed to build the plan.")

    monkeypatch.setattr(utils, "compile_model", fails)
    with pytest.raises(PackageError, match=r"cannot plan for fastvithd.mlpackage: Failed to build the plan\.$"):
        placement(tmp_path / "fastvithd.mlpackage")
