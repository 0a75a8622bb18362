"""Core ML's ML Programs: reading a saved `.mlpackage`, and running it anywhere.

`read_package` describes a package without torch; `Executor` (torch is imported on first use) runs one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .constexpr import Constants
from .package import read_package
from .program import (
    FLEXIBLE,
    Argument,
    Operation,
    Program,
    TensorType,
    Value,
    census,
    constexpr_census,
    max_rank,
    scheme,
    stored_bytes,
)
from .spec import model_class

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
    "max_rank",
    "model_class",
    "read_package",
    "scheme",
    "stored_bytes",
]


def __getattr__(name: str) -> Any:
    if name == "Executor":
        from .executor import Executor

        return Executor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
