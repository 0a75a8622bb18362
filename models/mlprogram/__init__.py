"""Core ML's ML Programs: reading a saved `.mlpackage`, and running it on any machine.

`read_package` reads a package without torch. `Executor` runs one, and imports torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .constexpr import Constants
from .package import model_class, read_package
from .program import (
    FLEXIBLE,
    Argument,
    Operation,
    Program,
    TensorType,
    Value,
    census,
    constexpr_census,
    inputs_for,
    max_rank,
    pack_bits,
    scheme,
    stored_bytes,
    unpack_bits,
)

if TYPE_CHECKING:
    from .executor import Executor

__all__ = [
    "FLEXIBLE",
    "Argument",
    "Constants",
    "Executor",
    "Operation",
    "Program",
    "TensorType",
    "Value",
    "census",
    "constexpr_census",
    "inputs_for",
    "max_rank",
    "model_class",
    "pack_bits",
    "read_package",
    "scheme",
    "stored_bytes",
    "unpack_bits",
]


def __getattr__(name: str) -> Any:
    if name == "Executor":
        from .executor import Executor

        return Executor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
