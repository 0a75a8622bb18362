"""The import of MLX for all modules, `from ._mlx import mx, nn`, after the fast BLAS is loaded."""

from __future__ import annotations

from .blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402 - the BLAS must be loaded first
import mlx.nn as nn  # noqa: E402

_cpu: bool | None = None
"""The result of `on_cpu` after its first call. Tests set it to run the branches for a GPU on a CPU."""


def on_cpu() -> bool:
    """Returns True if MLX computes on the CPU because the machine has neither Metal nor CUDA.

    The first call decides for the process, since layers call this in every step.
    """
    global _cpu
    if _cpu is None:
        _cpu = bool(mx.default_device() == mx.cpu)
    return _cpu


__all__ = ["BLAS", "mx", "nn", "on_cpu"]
