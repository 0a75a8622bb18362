"""Full float32 in MLX's matrix products, for comparisons with a float32 reference."""

from __future__ import annotations

import os

TF32_VARIABLE = "MLX_ENABLE_TF32"
"""MLX reads it at its first matrix product. By default GPUs that can (M5 and later) round the factors to 10 bits."""


def disable_tf32() -> None:
    """Makes float32 products exact to float32 in this process, unless the user has set MLX's variable.

    Takes effect only before the first matrix product in MLX.
    """
    os.environ.setdefault(TF32_VARIABLE, "0")
