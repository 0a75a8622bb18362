"""The device that MLX computes on: a GPU's memory, and one stream for the threads of a program."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

from ..models import _mlx
from ..models.language import LanguageSide

CACHE_BYTES = 256 * 2**20
"""The freed buffers that MLX may keep for reuse, in bytes. A step's activations and a growing key-value cache take far
less. MLX's own limit is the whole working set, so it would free almost nothing."""

HEADROOM_BYTES = 512 * 2**20
"""The memory that is wired in addition to the weights, in bytes: keys, values and activations of an answer."""


class DeviceMemory:
    """The limits of a GPU's memory: weights are wired while answers are computed, and freed buffers are few.

    Does nothing on a CPU. Not measured here, because it needs a Mac.

    Attributes:
        notes: a note if the weights alone exceed the working set that the device recommends.
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
        self._wired_bytes = min(weight_bytes + HEADROOM_BYTES, recommended)  # MLX refuses more than the recommendation
        if weight_bytes > recommended:
            self.notes = (
                f"the decoder takes {weight_bytes / 1e9:.1f} GB, and this GPU works with at most "
                f"{recommended / 1e9:.1f} GB: answers will be slow. Export with --decoder-bits 4, or use another model",
            )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Wires the weights until the last of several users leaves. Then frees the buffers that MLX kept for reuse."""
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
        """Frees the buffers of a prompt's activations, which decoding steps cannot reuse."""
        if self._wired_bytes:
            _mlx.mx.clear_cache()


def recommended_bytes() -> int | None:
    """Returns the working set in bytes that Metal recommends, or None on a CPU and on other devices."""
    if _mlx.on_cpu():
        return None
    info: dict[str, Any] = dict(_mlx.mx.device_info())
    found = info.get("max_recommended_working_set_size")
    return int(found) if found else None


def _weight_bytes(language: LanguageSide) -> int:
    from mlx.utils import tree_flatten

    weights = cast("list[tuple[str, _mlx.mx.array]]", tree_flatten(language.parameters()))
    return sum(array.nbytes for _, array in weights)


class SharedStream:
    """One MLX stream for all threads of a CPU. One thread at a time may enter it.

    MLX gives each thread a stream when it first computes, with another thread behind it on the CPU, and never frees it.
    A program with a new thread for every question would run out of threads. On Linux each stream also has a team of
    OpenMP threads for its products. If there are more of them than cores, all teams sleep after every product.
    """

    def __init__(self) -> None:
        self._stream: Any = None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context to compute in, which does nothing on a GPU and in versions whose streams are shared."""
        if not _mlx.on_cpu() or not hasattr(_mlx.mx, "new_thread_unsafe_stream"):
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = _mlx.mx.new_thread_unsafe_stream(_mlx.mx.cpu)
        return _mlx.mx.stream(self._stream)
