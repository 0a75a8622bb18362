"""The share of the vision encoder's work that Core ML gives to the Neural Engine, recorded next to the compiled copy.

On some systems the engine's compiler fails, and Core ML runs the package on the CPU without a message.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..models.compute_plan import Placement, placement
from ..models.errors import FastVLMError, MachineError
from .compiled_cache import SHARES, CompiledCache

ENGINE_UNITS = ("CPU_AND_NE", "ALL")
"""The compute units that may use the engine."""

EXPECTED_SHARE = 0.9
"""The share of the estimated cost, 0 to 1, below which there is a note. FastViTHD has 0.99 of it on the engine."""

MIN_ENGINE_SHARE = 0.5
"""The share of the estimated cost, 0 to 1, below which a result is not reported as the engine's."""

Plan = Callable[[Path, str], Placement]
"""A compiled copy and compute units -> the unit of each operation. Raises FastVLMError."""


def compiled_copy(package: Path, compute_units: str = ENGINE_UNITS[0], cache: CompiledCache | None = None) -> Path:
    """Returns the compiled copy of a package in the cache, and compiles it first if there is none.

    Raises:
        MachineError: this machine is not a Mac.
        PackageError: the package does not compile.
        OutputError: the cache folder cannot be written.
    """
    from .coreml import CoreMLTools

    return (cache or CompiledCache()).compiled(package, CoreMLTools(compute_units))


def engine_share(compiled: Path, compute_units: str = ENGINE_UNITS[0], plan: Plan | None = placement) -> float | None:
    """Returns the share of the estimated cost that Core ML places on the engine, 0 to 1.

    The share is found once for a compiled copy, in a separate process, which takes seconds. It is None where it cannot
    be known: off a Mac, before macOS 14.4, where the plan fails, and for compute units without the engine. If `plan` is
    None, only a recorded share is returned.
    """
    if compute_units not in ENGINE_UNITS:
        return None
    shares = _recorded(compiled)
    if compute_units not in shares:
        if plan is None:
            return None
        try:
            shares[compute_units] = plan(compiled, compute_units).engine_share
        except MachineError:  # another system, or a crash that may not happen again
            return None
        except FastVLMError:
            shares[compute_units] = None
        _record(compiled, shares)
    return shares[compute_units]


def planned_share(package: Path, compute_units: str = ENGINE_UNITS[0]) -> float | None:
    """Returns `engine_share` of a package's compiled copy. Raises MachineError, PackageError, OutputError."""
    return engine_share(compiled_copy(package, compute_units), compute_units)


def share_note(compiled: Path, compute_units: str = ENGINE_UNITS[0], plan: Plan | None = placement) -> str | None:
    """Returns a note if less than EXPECTED_SHARE of the work is on the engine (`engine_share`)."""
    share = engine_share(compiled, compute_units, plan)
    if share is None or share >= EXPECTED_SHARE:
        return None
    return (
        f"Core ML places {share:.0%} of the vision encoder's work on the Neural Engine ({compute_units}), and the rest "
        "on slower units: `fastvlm inspect FOLDER --placement` lists the operations"
    )


def _recorded(compiled: Path) -> dict[str, float | None]:
    try:
        found = json.loads(compiled.with_suffix(SHARES).read_text(encoding="utf-8"))
        return {str(units): None if share is None else float(share) for units, share in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _record(compiled: Path, shares: dict[str, float | None]) -> None:
    """Writes by rename. A cache that cannot be written only costs the time of another plan."""
    with contextlib.suppress(OSError):
        workplace = Path(tempfile.mkdtemp(prefix=".compiling-", dir=compiled.parent))
        try:
            (workplace / "shares").write_text(json.dumps(shares), encoding="utf-8")
            (workplace / "shares").replace(compiled.with_suffix(SHARES))
        finally:
            workplace.rmdir()
