"""The memory that a GPU works with, as MLX is told of it. Not measured here: this needs a Mac."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

from ..models import _mlx
from ..models.language import LanguageSide

CACHE_BYTES = 256 * 2**20
"""Freed buffers that MLX may keep for reuse: a step's activations and a growing key-value cache fit in it many times.

MLX's own limit is the whole working set, of which nothing would be given back.
"""

HEADROOM_BYTES = 512 * 2**20
"""Memory that is wired in addition to the weights: keys, values and activations of an answer."""


class DeviceMemory:
    """Keeps a GPU's weights wired while answers are computed, and its freed buffers few. Does nothing on a CPU.

    Attributes:
        notes: one where the weights alone do not fit the working set that the device recommends.
    """

    def __init__(self, language: LanguageSide) -> None:
        self.notes: tuple[str, ...] = ()
        self._wired_bytes = 0
        self._users = 0
        self._lock = threading.Lock()
        recommended = recommended_bytes()
        if recommended is None:
            return
        _mlx.mx.set_cache_limit(CACHE_BYTES)
        weight_bytes = _weight_bytes(language)
        self._wired_bytes = min(weight_bytes + HEADROOM_BYTES, recommended)  # MLX refuses more than is recommended
        if weight_bytes > recommended:
            self.notes = (
                f"the decoder takes {weight_bytes / 1e9:.1f} GB, and this GPU works with {recommended / 1e9:.1f} GB at "
                "most: answers will be slow; export with --decoder-bits 4, or use a smaller model",
            )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Wires the weights until the last of several users leaves; then frees what MLX kept for reuse."""
        if not self._wired_bytes:
            yield
            return
        with self._lock:
            self._users += 1
            if self._users == 1:
                _mlx.mx.set_wired_limit(self._wired_bytes)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    _mlx.mx.clear_cache()
                    _mlx.mx.set_wired_limit(0)

    def after_prefill(self) -> None:
        """Frees the buffers of a prompt's activations, which no step of decoding can use again."""
        if self._wired_bytes:
            _mlx.mx.clear_cache()


def recommended_bytes() -> int | None:
    """Bytes that Metal recommends to work with; None on a CPU and on other devices."""
    if _mlx.on_cpu():
        return None
    info: dict[str, Any] = dict(_mlx.mx.device_info())
    found = info.get("max_recommended_working_set_size")
    return int(found) if found else None


def _weight_bytes(language: LanguageSide) -> int:
    from mlx.utils import tree_flatten

    weights = cast("list[tuple[str, _mlx.mx.array]]", tree_flatten(language.parameters()))
    return sum(array.nbytes for _, array in weights)
