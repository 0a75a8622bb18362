"""How every module of ours gets MLX: `from ._mlx import mx, nn`, with the fast BLAS in place first."""

from __future__ import annotations

from .blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402 - the BLAS has to be there before
import mlx.nn as nn  # noqa: E402


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, for want of Metal and CUDA."""
    return bool(mx.default_device() == mx.cpu)


__all__ = ["BLAS", "mx", "nn", "on_cpu"]
