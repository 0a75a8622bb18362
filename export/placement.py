"""Where Core ML would run each operation of a package: its compute plan, which only a Mac can make."""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..models._coremltools import import_coremltools
from ..models.coreml_errors import coreml_reason
from ..models.errors import MachineError, PackageError

ENGINE, GPU, CPU, UNKNOWN = "neural engine", "GPU", "CPU", "unknown"

DEVICES = {"MLNeuralEngineComputeDevice": ENGINE, "MLGPUComputeDevice": GPU, "MLCPUComputeDevice": CPU}
"""What coremltools calls its devices, by the name of their class."""


class Plans(Protocol):
    """What makes compute plans: coremltools on a Mac, or a stand-in in tests."""

    def open(self, package: Path) -> AbstractContextManager[Any]:
        """coremltools' `MLComputePlan` of the package, for the engine and the CPU."""


@dataclass(frozen=True)
class Place:
    """Where one operation would run."""

    name: str
    kind: str
    device: str
    """What Core ML prefers, which may be another than the fastest that it supports."""
    cost: float
    """Its estimated share of the whole package's work, 0 to 1."""


@dataclass(frozen=True)
class Placement:
    """Where a package would run, operation by operation; constants are not counted."""

    places: tuple[Place, ...]

    @cached_property
    def cost_by_device(self) -> dict[str, float]:
        """Share of the estimated cost by device, 0 to 1, the largest first; without estimates, of the operations."""
        total: defaultdict[str, float] = defaultdict(float)
        whole = sum(place.cost for place in self.places)
        for place in self.places:
            total[place.device] += place.cost / whole if whole else 1 / len(self.places)
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def engine_share(self) -> float:
        return self.cost_by_device.get(ENGINE, 0.0)

    @property
    def elsewhere(self) -> list[Place]:
        """What would not run on the engine, the costliest first."""
        return sorted((place for place in self.places if place.device != ENGINE), key=lambda place: -place.cost)

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine_share": self.engine_share,
            "cost_by_device": self.cost_by_device,
            "operations": [asdict(place) for place in self.places],
        }


def placement(package: Path, plans: Plans | None = None) -> Placement:
    """Where Core ML would run the package's operations with `CPU_AND_NE`.

    Raises:
        MachineError: this is no Mac.
        PackageError: Core ML cannot compile the package or plan for it.
    """
    with (plans or CoreMLPlans()).open(package) as plan:
        return Placement(tuple(places(plan)))


def places(plan: Any) -> Iterator[Place]:
    """The place of every operation of a plan's main function that is computed for each image."""
    program = plan.model_structure.program
    if program is None or "main" not in program.functions:
        raise PackageError("the compute plan is not one of an ML Program; export the model again")
    for operation in program.functions["main"].block.operations:
        kind = operation.operator_name.rpartition(".")[2]  # "ios17.conv"
        if kind == "const" or kind.startswith("constexpr_"):
            continue
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        yield Place(
            name=operation.outputs[0].name if operation.outputs else kind,
            kind=kind,
            device=UNKNOWN if usage is None else DEVICES.get(type(usage.preferred_compute_device).__name__, UNKNOWN),
            cost=0.0 if cost is None else cost.weight,
        )


class CoreMLPlans:
    """coremltools' compute plans; the only code here that needs a Mac.

    Raises:
        MachineError: this is no Mac.
    """

    _ct: Any

    def __init__(self) -> None:
        if sys.platform != "darwin":
            raise MachineError("--placement asks Core ML where it would run the package, which only macOS can tell")
        self._ct = import_coremltools()

    @contextmanager
    def open(self, package: Path) -> Iterator[Any]:
        """See `Plans`. The package is compiled into a temporary folder, which lasts as long as the plan."""
        from coremltools.models.compute_plan import MLComputePlan

        with tempfile.TemporaryDirectory() as folder:
            compiled = str(Path(folder) / f"{package.stem}.mlmodelc")
            try:
                self._ct.models.utils.compile_model(str(package), compiled)
                plan = MLComputePlan.load_from_path(path=compiled, compute_units=self._ct.ComputeUnit.CPU_AND_NE)
            except Exception as reason:  # coremltools raises plain Exception and RuntimeError
                raise PackageError(f"Core ML cannot plan for {package.name}: {coreml_reason(reason)}") from reason
            yield plan
