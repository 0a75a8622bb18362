"""How every module gets MLX: `from ._mlx import mx, nn`, with the fast BLAS in place first."""

from __future__ import annotations

from .blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402 - the BLAS has to be there before
import mlx.nn as nn  # noqa: E402

_cpu: bool | None = None
"""The answer of `on_cpu`, once it has been asked. Tests set it to run the branches of a GPU on a CPU."""


def on_cpu() -> bool:
    """True where MLX computes on the CPU because there is neither Metal nor CUDA.

    The first call decides for the process: layers ask at every step.
    """
    global _cpu
    if _cpu is None:
        _cpu = bool(mx.default_device() == mx.cpu)
    return _cpu


__all__ = ["BLAS", "mx", "nn", "on_cpu"]
