"""MIL operations on torch, grouped by idea. Semantics follow the MIL operation reference of coremltools 9.0.

Each bind function takes the parameters of one operation and returns the step that runs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..binding import Kind, Parameters, Step
from .accumulation import FLOAT16_SUMS
from .elementwise import ELEMENTWISE, ROUND_TO_FLOAT16
from .indexing import INDEXING
from .matrix import MATRICES, dense, rows
from .reduction import REDUCTIONS
from .resizing import RESIZING
from .shape import SHAPES
from .window import WINDOWS

__all__ = ["FLOAT16_SUMS", "KINDS", "ROUND_TO_FLOAT16", "UNTYPED", "WRITE_STATE", "dense", "rows"]

WRITE_STATE = "write_state"
"""The kind that changes a state and has no result."""

UNTYPED = frozenset(("classify",))
"""The kinds whose results are not tensors."""


def _write_state(p: Parameters) -> Step:
    def step(state: Tensor, data: Tensor) -> tuple[()]:
        state.copy_(data)
        return ()

    return step


def _classify(p: Parameters) -> Step:
    """Returns the label of the highest probability, and the probability of each label."""
    classes = p.array("classes")
    labels = [] if classes is None else classes.reshape(-1).tolist()

    def step(probabilities: Tensor) -> tuple[str | int, dict[Any, float]]:
        values = probabilities.reshape(-1).tolist()
        if len(values) != len(labels) or not labels:
            raise ValueError(f"there must be a probability for each of {len(labels)} classes, got {len(values)}")
        return labels[max(range(len(values)), key=values.__getitem__)], dict(zip(labels, values, strict=True))

    return step


KINDS: dict[str, Kind] = {
    **ELEMENTWISE,
    **INDEXING,
    **MATRICES,
    **REDUCTIONS,
    **RESIZING,
    **SHAPES,
    **WINDOWS,
    "classify": Kind(("probabilities",), _classify),
    "read_state": Kind(("input",), lambda p: Tensor.clone),
    WRITE_STATE: Kind(("input", "data"), _write_state),
}
"""The kinds that can be run, by MIL name."""
