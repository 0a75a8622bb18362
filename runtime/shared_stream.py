"""What threads compute on that come and go."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ..models._mlx import mx, on_cpu


class SharedStream:
    """One stream of MLX's for all threads but the one that made this. To be entered by one thread at a time.

    MLX gives each thread a stream of its own when it first computes, behind which is another thread on the CPU, and
    never takes it back: a program with a new thread for every question would run out of them.
    """

    def __init__(self) -> None:
        self._home = threading.current_thread()
        self._stream: Any = None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """What to compute in. On a GPU, and where MLX is older and streams serve every thread, nothing changes."""
        if self._home is threading.current_thread() or not on_cpu() or not hasattr(mx, "new_thread_unsafe_stream"):
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = mx.new_thread_unsafe_stream(mx.cpu)
        return mx.stream(self._stream)
