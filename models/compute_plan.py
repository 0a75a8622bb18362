"""The compute plan of a compiled package: the device on which Core ML would run each operation. It needs a Mac.

Core ML compiles for the engine to make a plan. It holds the GIL meanwhile and can abort its process. `placement`
therefore uses another process, `python -P -m fastvlm.models.compute_plan COMPILED COMPUTE_UNITS`.
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
"""The devices by the names of coremltools' classes."""

FIRST_MACOS = (14, 4)
"""The first version of macOS with compute plans."""

PLAN_SECONDS = 300.0
"""The time limit of a plan, in seconds. It may compile for the engine, which took up to 105 s in public reports."""

COMMAND = (sys.executable, "-P", "-m", __name__)
"""The command of a new process. `-P` keeps a local folder from shadowing a module of its name."""


@dataclass(frozen=True)
class Place:
    """The device on which one operation would run."""

    name: str
    kind: str
    device: str
    """Core ML's preferred device, which may differ from the fastest supported one."""
    cost: float
    """The estimated share of the package's work, 0 to 1."""


@dataclass(frozen=True)
class Placement:
    """The devices on which a package would run, operation by operation, without constants."""

    places: tuple[Place, ...]

    @cached_property
    def cost_by_device(self) -> dict[str, float]:
        """The share of the estimated cost by device, 0 to 1, the largest first. Without estimates, operations count."""
        total: defaultdict[str, float] = defaultdict(float)
        whole = sum(place.cost for place in self.places)
        for place in self.places:
            total[place.device] += place.cost / whole if whole else 1 / len(self.places)
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def engine_share(self) -> float:
        """The share of the Neural Engine, 0 to 1."""
        return self.cost_by_device.get(ENGINE, 0.0)

    @property
    def elsewhere(self) -> list[Place]:
        """The operations outside the Neural Engine, the costliest first."""
        return sorted((place for place in self.places if place.device != ENGINE), key=lambda place: -place.cost)

    def as_dict(self) -> dict[str, Any]:
        """Returns the placement for JSON."""
        return {
            "engine_share": self.engine_share,
            "cost_by_device": self.cost_by_device,
            "operations": [asdict(place) for place in self.places],
        }


def placement(
    compiled: Path,
    compute_units: str = "CPU_AND_NE",
    command: Sequence[str] = COMMAND,
    *,
    seconds: float | None = None,
) -> Placement:
    """Returns the devices on which Core ML would run the operations of a `.mlmodelc`, found in a new process.

    The limit is `seconds`, by default PLAN_SECONDS.

    Raises:
        MachineError: this machine is not a Mac with compute plans, or the process ended without one.
        PackageError: Core ML cannot plan for the package.
    """
    check_plans()
    limit = PLAN_SECONDS if seconds is None else seconds
    try:
        done = subprocess.run(
            [*command, str(compiled), compute_units],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"Core ML made no compute plan within {limit:g} s on {compute_units}") from None
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
    """Raises MachineError if Core ML has no compute plans on this machine."""
    if sys.platform != "darwin":
        raise MachineError("Core ML's compute plan is missing: only macOS can tell where it would run the package")
    version = platform.mac_ver()[0]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < FIRST_MACOS:
        first = ".".join(map(str, FIRST_MACOS))
        raise MachineError(f"Core ML's compute plan is missing: it needs macOS {first} or newer (got {version})")


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the reason why a process ended without a plan."""
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"its process crashed with {name}"
    said = done.stderr.strip().splitlines() or ["it printed nothing"]
    return f"its process ended with exit code {done.returncode}: {said[-1]}"


def read_placement(compiled: Path, compute_units: str) -> Placement:
    """Returns the same as `placement`, found in this process. Only this function needs a Mac.

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
    """Yields the place of every operation of a plan's main function that runs for each image."""
    program = plan.model_structure.program
    if program is None or "main" not in program.functions:
        raise PackageError("the compute plan must be that of an ML Program. Export the model again.")
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Core ML holds the GIL, so a Python handler would not run
    signal.alarm(int(PLAN_SECONDS) + 10)  # ends this process if its parent has ended and Core ML hangs
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    compiled, compute_units = arguments
    try:
        result: dict[str, Any] = {"places": [astuple(p) for p in read_placement(Path(compiled), compute_units).places]}
    except FastVLMError as reason:
        result = {"error": type(reason).__name__, "message": str(reason)}
    json.dump(result, out)
    out.flush()
    os._exit(0)  # Core ML's queues may still use Python objects


if __name__ == "__main__":
    main(sys.argv[1:])
