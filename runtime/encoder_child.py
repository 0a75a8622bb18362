"""The process that runs a vision encoder for another: `python -P -m fastvlm.runtime.encoder_child`, by its parent.

Orders and replies are frames (`frames.py`) on pipes of their own, pixels and features are in shared memory. It ends
when the pipe of its orders is closed. See `encoder_process.py` for the other side.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..models.coreml_errors import coreml_reason
from ..models.errors import FastVLMError
from .compiled_cache import CompiledCache
from .encoders import CoreMLEncoder, ReferenceEncoder, Shapes, VisionEncoder
from .frames import FrameError, received, send
from .shared_memory import Layout, SharedMemory

Stage = Callable[[str], None]
"""Hears what begins: `import`, `open`, `warm`."""

Opener = Callable[[dict[str, Any], Stage], tuple[VisionEncoder, dict[str, Any]]]
"""The order to open an encoder -> the encoder, and facts: times in milliseconds, the compiled copy."""

MAX_MESSAGE = 2_000
"""Characters of an error message that are passed on."""


def open_backend(order: dict[str, Any], on_stage: Stage) -> tuple[VisionEncoder, dict[str, Any]]:
    """The package on Core ML or in the reference executor."""
    start = time.perf_counter()
    package, shapes = Path(order["package"]), Shapes(*order["shapes"])
    on_stage("import")
    if order["backend"] == "reference":
        from ..models.mlprogram import executor  # noqa: F401 - to time its import, which brings torch

        import_ms = 1000 * (time.perf_counter() - start)
        reference = ReferenceEncoder(package, shapes, order["precision"])
        return reference, {"import_ms": import_ms, "open_ms": 1000 * (time.perf_counter() - start) - import_ms}
    from .coreml import CoreMLTools

    tools = CoreMLTools(order["compute_units"])
    import_ms = 1000 * (time.perf_counter() - start)
    cache = CompiledCache(Path(order["cache"]), order["max_copies"])
    encoder = CoreMLEncoder(package, shapes, tools, cache, on_stage)
    times = {"import_ms": import_ms, "open_ms": encoder.open_ms, "first_predict_ms": encoder.first_predict_ms}
    return encoder, {**times, "compiled": str(encoder.compiled)}


class Worker:
    """Follows the orders of the parent."""

    def __init__(self, orders: int, replies: int, memory: int, opener: Opener) -> None:
        self._orders, self._replies, self._memory, self._opener = orders, replies, memory, opener

    def work(self) -> None:
        """Returns when there are no more orders. Raises FrameError, OSError."""
        orders = received(self._orders)
        order = next(orders, None)
        if order is None:
            return
        shared = SharedMemory(Layout(*order["layout"]), self._memory)
        os.close(self._memory)
        try:
            encoder, times = self._opener(order, self._on_stage)
        except Exception as reason:
            self._reply(0, error=described(reason))
            return
        self._reply(0, ready={"projected": encoder.projected, "compile_ms": encoder.compile_ms, **times})
        for order in orders:
            self._encode(encoder, shared, order["id"], order["slot"])

    def _encode(self, encoder: VisionEncoder, shared: SharedMemory, number: int, slot: int) -> None:
        start = time.perf_counter()
        try:
            features = encoder.encode(shared.pixels(slot))
            shared.features(slot, features.shape)[...] = features
        except Exception as reason:
            self._reply(number, error=described(reason))
            return
        self._reply(number, shape=features.shape, predict_ms=1000 * (time.perf_counter() - start))

    def _on_stage(self, stage: str) -> None:
        self._reply(0, stage=stage, since=time.monotonic())

    def _reply(self, number: int, **content: Any) -> None:
        send(self._replies, {"id": number, **content})


def described(reason: Exception) -> dict[str, Any]:
    """Returns an error as its class, its message and the arguments that it names."""
    if isinstance(reason, FastVLMError):
        kind, message, arguments = type(reason).__name__, str(reason), list(reason.arguments)
    elif isinstance(reason, MemoryError):
        kind, message, arguments = "MachineError", "the vision encoder: out of memory. Close other programs", []
    else:
        kind, message, arguments = "PackageError", f"the vision encoder failed: {coreml_reason(reason)}", []
    return {"kind": kind, "message": message[:MAX_MESSAGE], "arguments": arguments}


def main(opener: Opener = open_backend, arguments: list[str] | None = None) -> NoReturn:
    """Works until the parent closes its pipe.

    `os._exit` leaves out Python's finalizers: Core ML's queues may still hold objects of Python's.
    """
    orders, replies, memory = map(int, arguments or sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    for descriptor in (orders, replies, memory):
        os.set_inheritable(descriptor, False)
    code = 0
    try:
        Worker(orders, replies, memory, opener).work()
    except (FrameError, BrokenPipeError):  # the parent is gone
        code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
