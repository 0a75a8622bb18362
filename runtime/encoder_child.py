"""The process that runs a vision encoder for its parent: `python -P -m fastvlm.runtime.encoder_child`.

Requests and replies are messages on two pipes, pixels and features are in shared memory (`transport.py`). The process
ends when the pipe of requests is closed. `encoder_process.py` is the other side.
"""

from __future__ import annotations

import contextlib
import functools
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
from .coreml import CoreMLTools
from .encoders import CoreMLEncoder, ReferenceEncoder, Shapes, VisionEncoder
from .transport import FrameError, Layout, SharedMemory, received, send

Stage = Callable[[str], None]
"""Called with the stage of loading that starts: `import`, `open`, `warm`, `plan`."""

Opener = Callable[[dict[str, Any], Stage], tuple[VisionEncoder, dict[str, Any]]]
"""The first request -> the encoder, and facts for the parent: times in milliseconds, the compiled copy, notes."""

MAX_MESSAGE = 2_000
"""The number of characters of an error message that are sent to the parent."""

PLAN_SECONDS = 30.0
"""The longest wait for the engine's share of the work, in seconds, when a package was compiled. It takes a few."""


def open_backend(request: dict[str, Any], on_stage: Stage) -> tuple[VisionEncoder, dict[str, Any]]:
    """Opens the package in Core ML or in the reference executor."""
    start = time.perf_counter()
    package, shapes = Path(request["package"]), Shapes(*request["shapes"])
    on_stage("import")
    if request["backend"] == "reference":
        from ..models.mlprogram import executor  # noqa: F401 - times the import of torch

        import_ms = 1000 * (time.perf_counter() - start)
        reference = ReferenceEncoder(package, shapes, request["precision"])
        return reference, {"import_ms": import_ms, "open_ms": 1000 * (time.perf_counter() - start) - import_ms}
    tools = CoreMLTools(request["compute_units"])
    import_ms = 1000 * (time.perf_counter() - start)
    cache = CompiledCache(Path(request["cache"]), request["max_copies"])
    encoder = CoreMLEncoder(package, shapes, tools, cache, on_stage)
    times = {"import_ms": import_ms, "open_ms": encoder.open_ms, "first_predict_ms": encoder.first_predict_ms}
    start = time.perf_counter()
    notes = placement_notes(encoder, request["compute_units"], on_stage)
    if encoder.compile_ms:
        times["compile_ms"] = encoder.compile_ms + 1000 * (time.perf_counter() - start)
    return encoder, {**times, "compiled": str(encoder.compiled), "notes": notes}


def placement_notes(encoder: CoreMLEncoder, compute_units: str, on_stage: Stage) -> list[str]:
    """Returns a note if too little work is on the Neural Engine. Only the first use of the package asks Core ML."""
    from ..models.compute_plan import placement  # local, because only Core ML needs the 20 ms of their import
    from .engine_share import share_note

    plan = None
    if encoder.compile_ms:
        on_stage("plan")
        plan = functools.partial(placement, seconds=PLAN_SECONDS)
    note = share_note(encoder.compiled, compute_units, plan)
    return [note] if note else []


class Worker:
    """The loop that serves the parent's requests."""

    def __init__(self, requests: int, replies: int, memory: int, opener: Opener) -> None:
        self._requests, self._replies, self._memory, self._opener = requests, replies, memory, opener

    def work(self) -> None:
        """Serves requests until the pipe is closed. Raises FrameError, OSError."""
        requests = received(self._requests)
        request = next(requests, None)
        if request is None:
            return
        shared = SharedMemory(Layout(*request["layout"]), self._memory)
        os.close(self._memory)
        try:
            encoder, times = self._opener(request, self._on_stage)
        except Exception as reason:
            self._reply(0, error=described(reason))
            return
        self._reply(0, ready={"projected": encoder.projected, "compile_ms": encoder.compile_ms, **times})
        for request in requests:
            self._encode(encoder, shared, request["id"], request["slot"])

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
    """Serves requests until the parent closes its pipe.

    `os._exit` skips Python's finalizers, because Core ML's queues may still refer to Python objects.
    """
    requests, replies, memory = map(int, arguments or sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles it
    for descriptor in (requests, replies, memory):
        os.set_inheritable(descriptor, False)
    code = 0
    try:
        Worker(requests, replies, memory, opener).work()
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
