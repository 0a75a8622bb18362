"""The memory that a GPU works with, as MLX is told of it. Not measured here: this needs a Mac."""

from __future__ import annotations

from typing import Any, cast

from ..models import _mlx
from ..models.language import LanguageSide


def bound_memory(language: LanguageSide) -> tuple[str, ...]:
    """Keeps MLX within the working set that the device recommends, and its weights from being swapped out.

    Returns a note when the weights alone do not fit. Does nothing on a CPU.
    """
    from mlx.utils import tree_flatten

    recommended = recommended_bytes()
    if recommended is None:
        return ()
    _mlx.mx.set_memory_limit(recommended)
    _mlx.mx.set_wired_limit(recommended)
    weights = cast("list[tuple[str, _mlx.mx.array]]", tree_flatten(language.parameters()))
    weight_bytes = sum(array.nbytes for _, array in weights)
    if weight_bytes <= recommended:
        return ()
    return (
        f"the decoder takes {weight_bytes / 1e9:.1f} GB, and this GPU works with {recommended / 1e9:.1f} GB at most: "
        "answers will be slow; export with --decoder-bits 4, or use a smaller model",
    )


def recommended_bytes() -> int | None:
    """Bytes that Metal recommends to work with; None on a CPU and on other devices."""
    if _mlx.on_cpu():
        return None
    info: dict[str, Any] = dict(_mlx.mx.device_info())
    found = info.get("max_recommended_working_set_size")
    return int(found) if found else None
