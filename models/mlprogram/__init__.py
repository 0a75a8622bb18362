"""Core ML's ML Programs: reading a saved `.mlpackage`, and running it on any machine.

`load` gives a package coremltools' `predict`. `read_package` reads one without torch, and `Executor` runs it. `load`,
`Model`, `State` and `Executor` import torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .constexpr import Constants
from .package import model_class, read_package
from .program import (
    FLEXIBLE,
    Argument,
    Feature,
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
    from .model import Model, State, load

__all__ = [
    "FLEXIBLE",
    "Argument",
    "Constants",
    "Executor",
    "Feature",
    "Model",
    "Operation",
    "Program",
    "State",
    "TensorType",
    "Value",
    "census",
    "constexpr_census",
    "inputs_for",
    "load",
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
    if name in ("Model", "State", "load"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
