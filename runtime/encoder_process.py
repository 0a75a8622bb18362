"""The vision encoder in a process of its own, with errors for its crashes.

Core ML holds the GIL while it compiles, loads and predicts, can abort or be killed by the system, and may print
anything. In a child none of that reaches this process: signals are handled immediately, a crash is an error, and the
next image is encoded while the decoder generates. `encoder_child.py` is the other side.
"""

from __future__ import annotations

import itertools
import signal
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ..models.errors import CrashError, FastVLMError, MachineError, UsageError
from ..models.folder_layout import OUTPUT_NAME
from .child_process import CHILD_MODULE, ChildProcess, Ending, Reply
from .compiled_cache import CompiledCache
from .coreml import default_compute_units
from .encoders import OnWait, Shapes, check_pixels
from .transport import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models.mlprogram.executor import Precision

TICK_SECONDS = 0.1
"""The time between two checks of a wait's limit, in seconds."""

QUIET_SECONDS = 2.0
"""The time in seconds after which loading is reported to `on_wait`."""

RETRY_SECONDS = 60.0
"""The time in seconds from two crashes in a row to the next start. A crash loop costs little, and a server recovers."""


@dataclass(frozen=True)
class Limits:
    """The times after which a process counts as hanging, in seconds."""

    load: float = 600.0
    """The slowest reported first use on an engine took 105 s. A load without an engine can hang for half an hour."""
    predict: float = 300.0
    """The engine takes 0.1 s, the reference executor up to 10 s on two cores."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class LoadTimes:
    """The times of loading inside the process, in milliseconds."""

    import_ms: float = 0.0
    open_ms: float = 0.0
    """Loading of the package, with compiling if there was no copy."""
    first_predict_ms: float = 0.0
    """One run on zeros. 0 for the reference executor, which needs none."""
    compile_ms: float = 0.0
    """The first use of the package on this machine's engine, 0 for later uses."""


class EncoderProcess:
    """A `VisionEncoder` whose package runs in a child process. Several threads may use it.

    The process starts here and loads while this one does other work. It ends with `close`, with the last reference to
    this object, and with this process, however that ends. After a crash the next image starts it again.

    Attributes:
        name: `coreml` or `reference`.
        image_size: the side of the input square, in pixels.
        compute_units: the units of Core ML, None for the reference executor.
        predict_ms: the time of the last image inside the process.
    """

    def __init__(
        self,
        package: Path,
        shapes: Shapes,
        *,
        backend: Literal["coreml", "reference"] = "coreml",
        compute_units: str | None = None,
        precision: Precision = "float32",
        cache: CompiledCache | None = None,
        on_wait: OnWait | None = None,
        limits: Limits = DEFAULT_LIMITS,
        program: tuple[str, ...] = CHILD_MODULE,
    ) -> None:
        self.name: str = backend
        self.image_size = shapes.image_size
        self.compute_units = (compute_units or default_compute_units()) if backend == "coreml" else None
        self.predict_ms = 0.0
        self._package, self._shapes, self._program = package, shapes, program
        self._limits, self._on_wait = limits, on_wait
        cache = cache or CompiledCache()
        tokens = shapes.output(OUTPUT_NAME)[1]
        self._layout = Layout(shapes.image_size, tokens * max(shapes.channels, shapes.hidden_size))
        self._opening = {
            "id": 0,
            "layout": [self._layout.image_size, self._layout.feature_count],
            "package": str(package.absolute()),
            "shapes": [shapes.image_size, shapes.channels, shapes.hidden_size],
            "backend": backend,
            "compute_units": self.compute_units,
            "precision": precision,
            "cache": str(cache.folder.absolute()),
            "max_copies": cache.max_copies,
        }
        self._numbers = itertools.count(1)
        self._starting, self._counting = Lock(), Lock()
        self._crashes = 0
        """The number of crashes in a row, without an image between them."""
        self._crashed_at = 0.0
        self._last_error: FastVLMError = MachineError("")
        self._uncounted: ChildProcess | None = None
        """The last child, until its end has been counted."""
        self._closed = False
        self._running: list[ChildProcess] = []
        """The child, if there is one. It is in a list because the finalizer must not refer to this object."""
        self._finalizer = weakref.finalize(self, _end_all, self._running)
        self._loaded: dict[str, Any] = {}
        self._process()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process. No image can be encoded after that."""
        self._closed = True
        self._uncounted = None
        _end_all(self._running)

    @property
    def pid(self) -> int | None:
        """The id of the process while it runs, else None."""
        running = next(iter(self._running), None)
        return running.pid if running is not None and running.ending is None else None

    def room(self) -> int:
        """Returns the number of images that `submit` accepts without waiting. Starts a child if there is none."""
        return self._process().free_slots.qsize()

    @property
    def projected(self) -> bool:
        """True if the package has the projector. Waits until it is loaded."""
        return bool(self._ready()["projected"])

    @property
    def times(self) -> LoadTimes:
        """The times of the first loading. Waits until it is over."""
        ready = self._ready()
        names = ("import_ms", "open_ms", "first_predict_ms", "compile_ms")
        return LoadTimes(**{name: float(ready.get(name, 0.0)) for name in names})

    @property
    def compiled(self) -> Path | None:
        """The compiled copy that Core ML has opened, None for the reference executor. Waits until it is loaded."""
        found = self._ready().get("compiled")
        return None if found is None else Path(str(found))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the package runs here. Waits until it is loaded."""
        return tuple(map(str, self._ready().get("notes", ())))

    @property
    def compile_ms(self) -> float:
        """The time of the package's first use on this machine's engine, 0 for later uses. Waits until it is loaded."""
        return self.times.compile_ms

    def wait_ready(self) -> None:
        """Waits until the package is loaded.

        Raises:
            CrashError: the process ended, or hung.
            PackageError: the package cannot be read, compiled or opened.
            MachineError: the process cannot be started, or crashed twice in a row.
        """
        self._ready()

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (1, 3, S, S) float32 in 0..1 to (1, (S/64)^2, C or D) float32. Raises as `wait_ready` does."""
        return self.submit(pixel_values).result()

    def submit(self, pixel_values: NDArray[np.float32]) -> Pending:
        """Starts to encode an image. Waits until there is room for it.

        Raises:
            PackageError: the pixels have another shape.
            MachineError: the process cannot be started, or crashed twice in a row.
        """
        check_pixels(pixel_values, self._shapes)
        process, slot = self._free_slot()
        try:
            np.copyto(process.memory.pixels(slot), pixel_values)
            reply = Reply(next(self._numbers), slot)
        except BaseException:
            process.free_slots.put(slot)
            raise
        process.request(reply, {"id": reply.number, "slot": slot})
        return Pending(self, process, reply, pixel_values)

    def _free_slot(self) -> tuple[ChildProcess, int]:
        while True:
            process = self._process()
            try:
                return process, process.free_slots.get(timeout=TICK_SECONDS)
            except Empty:
                self._watch(process)

    def _process(self) -> ChildProcess:
        """Returns the child, and starts it if there is none. Raises MachineError."""
        with self._starting:
            if self._closed:
                raise UsageError("the model is closed. Load it again.")
            if self._running and self._running[0].ending is None:
                return self._running[0]
            if self._running:
                self._counted(self._running[0])
            _end_all(self._running)
            if self._crashes > 1 and time.monotonic() - self._crashed_at < RETRY_SECONDS:
                raise type(self._last_error)(str(self._last_error), *self._last_error.arguments)
            self._running.append(ChildProcess(self._program, self._layout, self._shapes, self._opening))
            self._uncounted = self._running[0]
            return self._running[0]

    def _ready(self) -> dict[str, Any]:
        if not self._loaded:
            running = next(iter(self._running), None)  # another thread may end the child at any time
            if running is not None and running is self._uncounted and not self._closed:
                process = running  # a crash while loading is reported before the child is started again
            else:
                process = self._process()
            outcome = self._outcome(process, process.opening)
            assert isinstance(outcome, dict)
            self._loaded = outcome
        return self._loaded

    def _outcome(self, process: ChildProcess, reply: Reply) -> Any:
        """Waits for the outcome of a reply. Raises its error, or the error of a child that ended."""
        while reply.outcome is None:
            reply.wait(TICK_SECONDS)
            self._watch(process)
        if isinstance(reply.outcome, Ending):
            raise self._counted(process)
        if isinstance(reply.outcome, FastVLMError):
            raise self._counted(process) if process.ending else reply.outcome
        return reply.outcome

    def _features(self, pending: Pending) -> NDArray[np.float32]:
        """Waits for an image. If its child ended before it started with the image, the next child encodes it."""
        while True:
            try:
                features: NDArray[np.float32] = self._outcome(pending.process, pending.reply)
            except FastVLMError:
                if self._closed or not pending.reply.innocent:
                    raise
                again = self.submit(pending.pixel_values)
                pending.process, pending.reply = again.process, again.reply
                continue
            self._crashes = 0
            self.predict_ms = pending.reply.predict_ms
            return features

    def _watch(self, process: ChildProcess) -> None:
        """Ends a child that hangs, and reports what loading waits for."""
        since = process.working_since
        if since is None:
            return
        start, loading = since
        limit = self._limits.load if loading else self._limits.predict
        if time.monotonic() - start > limit:
            process.fail(Ending("hang", f"{limit:.0f} s", loading=loading))
        elif loading and process.stage is not None and self.name == "coreml" and self._on_wait:
            seconds = time.monotonic() - process.stage[1]
            if seconds > QUIET_SECONDS:
                self._on_wait(self._wait_text, seconds)

    @property
    def _wait_text(self) -> str:
        if self.compute_units in ("CPU_AND_NE", "ALL"):
            return "Compiling for the Neural Engine (first use, up to two minutes)"
        return f"Loading the vision encoder on {self.compute_units}"

    def _counted(self, process: ChildProcess) -> FastVLMError:
        """Returns the error of a child that ended, and counts it once. The second in a row is a MachineError."""
        with self._counting:
            ending = process.ending
            if ending is None or ending.kind == "closed":
                return UsageError("the model is closed. Load it again.")
            error = ending.error or self._crash_error(process, ending)
            if process is self._uncounted:
                self._uncounted = None
                if not ending.idle:
                    self._crashes += 1
                    self._crashed_at = time.monotonic()
            if self._crashes > 1 and isinstance(error, CrashError):
                error = MachineError(f"{error} (crashes in a row: {self._crashes})", *error.arguments)
            self._last_error = error
            return error

    def _crash_error(self, process: ChildProcess, ending: Ending) -> CrashError:
        """Returns a one-line error with the ending, the work, the compute units and the remedy."""
        core_ml = self.name == "coreml"
        subject = "Core ML" if core_ml else "the vision encoder"
        how = {
            "signal": f"was ended by {_signal_name(ending.number)}",
            "exit": f"exited with code {ending.number}",
            "hang": f"did not answer within {ending.detail}",
            "rubbish": f"sent data other than messages ({ending.detail})",
        }[ending.kind]
        at = "loaded the package" if ending.loading else "encoded an image"
        units = f" on {self.compute_units}" if core_ml else ""
        output = f' (its last output: "{process.last_output}")' if process.last_output else ""
        memory = "The system does so when memory runs out. Close other programs. " if ending.number == 9 else ""
        folder = self._package.parent
        if not core_ml:
            advice, arguments = "Leave out encoder_process=True.", ["encoder_process"]
        elif self.compute_units == "CPU_ONLY":
            advice, arguments = f"Try backend='reference', and run fastvlm verify {folder} --on-device.", ["backend"]
        else:
            find = f"find the units that work with fastvlm verify {folder} --on-device"
            advice, arguments = f"Try compute_units='CPU_ONLY', and {find}.", ["compute_units"]
        return CrashError(
            f"{subject}: its process {how} while it {at}{units}{output}. {memory}{advice}",
            *arguments,
            signal_number=ending.number if ending.kind == "signal" else None,
            exit_code=ending.number if ending.kind == "exit" else None,
        )


class Pending:
    """The features of an image that the process is encoding."""

    def __init__(
        self, encoder: EncoderProcess, process: ChildProcess, reply: Reply, pixel_values: NDArray[np.float32]
    ) -> None:
        self.process, self.reply, self.pixel_values = process, reply, pixel_values
        self._encoder = encoder

    @property
    def done(self) -> bool:
        """True if `result` does not wait, except for the next process after a crash."""
        return self.reply.outcome is not None

    @property
    def predict_ms(self) -> float:
        """The time of the image inside the process, 0 before it is done."""
        return self.reply.predict_ms

    def result(self) -> NDArray[np.float32]:
        """Waits for the features and returns them. Raises as `EncoderProcess.encode` does."""
        return self._encoder._features(self)


def _end_all(running: list[ChildProcess]) -> None:
    while running:
        running.pop().end()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
