"""Where Core ML would run each operation of a compiled package: its compute plan, which only a Mac can make.

A plan compiles for the engine, holds the GIL meanwhile and can abort its process: `placement` makes it in another one,
`python -P -m fastvlm.models.compute_plan COMPILED COMPUTE_UNITS`.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .coreml_errors import coreml_reason
from .errors import FastVLMError, MachineError, PackageError
from .versions import import_coremltools

ENGINE, GPU, CPU, UNKNOWN = "neural engine", "GPU", "CPU", "unknown"

DEVICES = {"MLNeuralEngineComputeDevice": ENGINE, "MLGPUComputeDevice": GPU, "MLCPUComputeDevice": CPU}
"""What coremltools calls its devices, by the name of their class."""

FIRST_MACOS = (14, 4)
"""The first that has compute plans."""

PLAN_SECONDS = 300.0
"""Limit for a plan: it may compile for the engine, which took 105 s at most in reports of others."""

COMMAND = (sys.executable, "-P", "-m", __name__)
"""-P: a folder here that is named like a module must not take its place."""


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


def placement(compiled: Path, compute_units: str = "CPU_AND_NE", command: Sequence[str] = COMMAND) -> Placement:
    """Where Core ML would run the operations of a `.mlmodelc`, found in a new process.

    Raises:
        MachineError: this machine is not a Mac with compute plans, or the process ended without one.
        PackageError: Core ML cannot plan for the package.
    """
    check_plans()
    try:
        done = subprocess.run(
            [*command, str(compiled), compute_units],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PLAN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"Core ML made no compute plan within {PLAN_SECONDS:g} s on {compute_units}") from None
    try:
        found = json.loads(done.stdout)
        if "error" in found:
            kind = {"MachineError": MachineError}.get(found["error"], PackageError)
            raise kind(str(found["message"]))
        return Placement(tuple(Place(str(name), str(kind), str(device), float(cost))
                               for name, kind, device, cost in found["places"]))  # fmt: skip
    except (ValueError, LookupError, TypeError):
        raise MachineError(f"Core ML made no compute plan on {compute_units}: {_end_of(done)}") from None


def check_plans() -> None:
    """Raises MachineError where Core ML has no compute plans."""
    if sys.platform != "darwin":
        raise MachineError("Core ML's compute plan is missing: only macOS can tell where it would run the package")
    version = platform.mac_ver()[0]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < FIRST_MACOS:
        first = ".".join(map(str, FIRST_MACOS))
        raise MachineError(f"Core ML's compute plan is missing: it needs macOS {first} or newer (got {version})")


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that gave no plan."""
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"its process crashed with {name}"
    said = done.stderr.strip().splitlines() or ["it printed nothing"]
    return f"its process ended with exit code {done.returncode}: {said[-1]}"


def read_placement(compiled: Path, compute_units: str) -> Placement:
    """What `placement` returns, found in this process: the only code here that needs a Mac.

    Raises:
        MachineError: coremltools is missing.
        PackageError: Core ML cannot plan for the package.
    """
    ct = import_coremltools(conversion=False)
    from coremltools.models.compute_plan import MLComputePlan

    try:
        units = ct.ComputeUnit[compute_units]
        return Placement(tuple(places(MLComputePlan.load_from_path(path=str(compiled), compute_units=units))))
    except FastVLMError:
        raise
    except Exception as reason:  # coremltools raises plain Exception and RuntimeError
        raise PackageError(f"Core ML cannot plan for {compiled.name}: {coreml_reason(reason)}") from reason


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


def main(arguments: Sequence[str]) -> None:
    """Writes a plan to stdout, to which nothing else can write, as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Core ML holds the GIL: no handler of Python's would run
    signal.alarm(int(PLAN_SECONDS) + 10)  # ends this process where its parent is gone and Core ML hangs
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    compiled, compute_units = arguments
    try:
        result: dict[str, Any] = {"places": [astuple(p) for p in read_placement(Path(compiled), compute_units).places]}
    except FastVLMError as reason:
        result = {"error": type(reason).__name__, "message": str(reason)}
    json.dump(result, out)
    out.flush()
    os._exit(0)  # Core ML's queues may still hold objects of Python's


if __name__ == "__main__":
    main(sys.argv[1:])
