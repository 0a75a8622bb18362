"""The vision encoder of a model folder, behind one interface: `pixel_values` -> `image_features`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..models.blas import release_torch_threads
from ..models.config import PATCH_SIZE, FastVLMConfig
from ..models.errors import MachineError, PackageError, UsageError
from ..models.folder_layout import EMBEDS_NAME, OUTPUT_NAME, has_mlx_encoder
from ..models.mlprogram import Program, read_package
from ..models.mlprogram.program import inputs_for
from .compiled_cache import CompiledCache, Compiler, Predict
from .timings import LapClock

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..models.mlprogram.executor import Precision

COMPUTE_UNITS = ("CPU_AND_NE", "CPU_ONLY", "CPU_AND_GPU", "ALL")
"""What Core ML may run a package on: the engine first."""

UNITS_VARIABLE = "FASTVLM_COMPUTE_UNITS"
"""Names the compute units where none are asked for: one of COMPUTE_UNITS."""

OnWait = Callable[[str, float], None]
"""Hears what loading waits for, and for how many seconds so far."""

VISION_NAMES = ("coreml", "reference", "mlx")


@dataclass(frozen=True)
class Shapes:
    """What `config.json` says of a package: what it was exported for."""

    image_size: int
    channels: int
    """Of `image_features`."""
    hidden_size: int
    """Of `image_embeds`, the output of a package that holds the projector."""

    @classmethod
    def of(cls, config: FastVLMConfig) -> Shapes:
        return cls(config.image_size, config.mm_hidden_size, config.decoder.hidden_size)

    def output(self, name: str) -> tuple[int, int, int]:
        width = self.hidden_size if name == EMBEDS_NAME else self.channels
        return 1, (self.image_size // PATCH_SIZE) ** 2, width


class VisionEncoder(Protocol):
    """What turns pixels into features.

    Attributes:
        name: `coreml`, `reference` or `mlx`.
        image_size: side of the square that it takes, in pixels.
        projected: whether the package holds the projector, so that its features are what the decoder takes in.
        compile_ms: time of the first use of the package on this machine's engine; 0 when that was earlier.
    """

    @property
    def name(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def projected(self) -> bool: ...
    @property
    def compile_ms(self) -> float: ...

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, 3, S, S) float32 in 0..1 -> (1, (S/64)^2, C or D) float32. Raises PackageError."""


class PendingFeatures(Protocol):
    """An image on its way through an encoder."""

    @property
    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""

    def result(self) -> NDArray[np.float32]:
        """What `encode` would return. Raises what it would raise."""


@runtime_checkable
class SeparateEncoder(Protocol):
    """An encoder that works while this process does something else; a `VisionEncoder` too.

    Attributes:
        room: images that `submit` takes at once, without waiting for another.
    """

    @property
    def room(self) -> int: ...

    def submit(self, pixel_values: NDArray[np.float32]) -> PendingFeatures:
        """Begins what `encode` does; see there."""

    def wait_ready(self) -> None:
        """Returns when it is loaded. Raises PackageError or MachineError when it cannot be."""

    def close(self) -> None:
        """Ends its process."""


def open_encoder(
    package: Path,
    vision: str | None,
    shapes: Shapes,
    compute_units: str | None = None,
    encoder_process: bool = False,
    on_wait: OnWait | None = None,
) -> VisionEncoder:
    """The package on the back end `vision`; None takes Core ML on a Mac and the reference executor elsewhere.

    Where there is no package, the folder holds the encoder in MLX, and `mlx` is the one back end. `compute_units` is
    one of COMPUTE_UNITS, for Core ML alone; None takes FASTVLM_COMPUTE_UNITS, else the first. Core ML runs in a process
    of its own, which loads while this one does other work; with `encoder_process` the reference executor does too.

    Raises:
        UsageError: no such back end, or not for this folder; no such compute units, or not for this back end.
        MachineError: this machine has not got it.
        PackageError: the package cannot be read or compiled.
    """
    in_mlx = not package.is_dir() and has_mlx_encoder(package.parent)
    if vision in VISION_NAMES and in_mlx != (vision == "mlx"):
        held = (
            "holds its encoder in MLX: leave vision out, or use 'mlx'" if in_mlx else "has a package: leave out 'mlx'"
        )
        raise UsageError(f"vision {vision!r} does not fit {package.parent}, which {held}")
    if vision is None:
        vision = "mlx" if in_mlx else "coreml" if sys.platform == "darwin" else "reference"
    check_compute_units(vision, compute_units)
    if vision == "mlx":
        if encoder_process:
            raise UsageError(
                f"encoder_process=True runs packages, and {package.parent} has none. Leave encoder_process out",
                "encoder_process",
            )
        from .mlx_encoder import MLXEncoder

        return MLXEncoder(package.parent, shapes)
    if vision == "coreml":
        check_mac()
        from .encoder_process import EncoderProcess

        units = compute_units or default_compute_units()
        return EncoderProcess(package, shapes, compute_units=units, on_wait=on_wait)
    if vision == "reference":
        if not encoder_process:
            return ReferenceEncoder(package, shapes)
        from .encoder_process import EncoderProcess

        return EncoderProcess(package, shapes, backend="reference", on_wait=on_wait)
    raise UsageError(f"vision should be 'coreml', 'reference' or 'mlx'; found {vision!r:.40}")


def close_encoder(encoder: VisionEncoder) -> None:
    """Ends the encoder's process, where it has one."""
    if isinstance(encoder, SeparateEncoder):
        encoder.close()


def check_mac() -> None:
    """Raises MachineError where Core ML cannot run."""
    if sys.platform != "darwin":
        raise MachineError("Core ML runs on macOS only; leave vision out, or use vision='reference'")


def default_compute_units() -> str:
    """What FASTVLM_COMPUTE_UNITS names, else the engine with the CPU. Raises UsageError."""
    named = os.environ.get(UNITS_VARIABLE)
    if not named:
        return COMPUTE_UNITS[0]
    if named not in COMPUTE_UNITS:
        raise UsageError(f"{UNITS_VARIABLE} should be one of {', '.join(COMPUTE_UNITS)}; found {named!r:.40}")
    return named


def check_compute_units(vision: str, compute_units: str | None) -> None:
    """Raises UsageError unless they are Core ML's, and Core ML is what runs the package."""
    if compute_units is None:
        return
    if compute_units not in COMPUTE_UNITS:
        raise UsageError(f"compute_units should be one of {', '.join(COMPUTE_UNITS)}; found {compute_units!r:.40}")
    if vision != "coreml":
        raise UsageError(f"compute_units are Core ML's, and vision is {vision!r:.40} here: leave them out")


class ReferenceEncoder:
    """The package in the reference executor, which runs ML Programs on torch, in float32 or as if in float16."""

    name = "reference"
    compile_ms = 0.0

    def __init__(self, package: Path, shapes: Shapes, precision: Precision = "float32") -> None:
        from ..models.mlprogram.executor import Executor  # brings torch

        self._shapes = shapes
        self._executor = Executor(package, precision=precision)
        release_torch_threads()
        self.image_size = shapes.image_size
        self.projected = is_projected(self._executor.program)

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        check_pixels(pixel_values, self._shapes)
        outputs = self._executor.run(inputs_for(self._executor.program, pixel_values))
        release_torch_threads()
        return checked_features(outputs, self._shapes)


PINNED_REFERENCES = 2**20
"""References to the array that Core ML reads.

coremltools' wheels up to 9.0 give theirs up about a second after `predict`, in a thread without the GIL: the count may
drift by one for each image, and whoever brings it to zero crashes the process.
"""


class CoreMLEncoder:
    """The package in Core ML; compiled once per machine. It is run once here, so that the first image does not wait.

    `on_stage` is called with `open` and `warm` as they begin.

    Attributes:
        open_ms: time of loading the compiled copy.
        first_predict_ms: time of the first run, on zeros.
        compiled: the copy of the package that Core ML has opened.
    """

    name = "coreml"

    def __init__(
        self,
        package: Path,
        shapes: Shapes,
        compiler: Compiler,
        cache: CompiledCache | None = None,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._shapes = shapes
        self._program = read_package(package)
        self.image_size = shapes.image_size
        self.projected = is_projected(self._program)
        self._pixels = np.zeros((1, 3, shapes.image_size, shapes.image_size), np.float32)
        self._pinned = (self._pixels,) * PINNED_REFERENCES
        on_stage("open")
        clock = LapClock()
        opened = (cache or CompiledCache()).open(package, compiler)
        self._predict: Predict = opened.predict
        self.compiled = opened.compiled
        self.open_ms = clock.lap_ms()
        on_stage("warm")
        self._encoded()
        self.first_predict_ms = clock.lap_ms()
        self.compile_ms = self.open_ms + self.first_predict_ms if opened.compiled_now else 0.0

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        check_pixels(pixel_values, self._shapes)
        np.copyto(self._pixels, pixel_values)
        return self._encoded()

    def _encoded(self) -> NDArray[np.float32]:
        inputs: dict[str, Any] = dict(inputs_for(self._program, self._pixels))
        for name in self._program.image_inputs:
            inputs[name] = picture(inputs[name])
        return checked_features(self._predict(inputs), self._shapes)


def is_projected(program: Program) -> bool:
    """Whether the package holds the projector."""
    return any(tensor.name == EMBEDS_NAME for tensor in program.outputs)


def picture(pixels: NDArray[np.float32]) -> Image:
    """What coremltools takes for an image input: a PIL image of (1, 3, S, S) in 0..255."""
    from PIL.Image import fromarray

    return fromarray(pixels[0].astype(np.uint8).transpose(1, 2, 0))  # (S, S, 3)


def check_pixels(pixel_values: NDArray[np.float32], shapes: Shapes) -> None:
    """Raises PackageError unless they are (1, 3, S, S) float32."""
    expected = (1, 3, shapes.image_size, shapes.image_size)
    if pixel_values.shape != expected or pixel_values.dtype != np.float32:
        raise PackageError(
            f"the encoder takes float32 of shape {expected}; found {pixel_values.dtype} of shape {pixel_values.shape}"
        )


def checked_features(outputs: Mapping[str, Any], shapes: Shapes) -> NDArray[np.float32]:
    """The package's output as float32. Raises PackageError when it is missing, misshapen or not finite."""
    name = EMBEDS_NAME if EMBEDS_NAME in outputs else OUTPUT_NAME
    if name not in outputs:
        raise PackageError(f"the package should have an output {OUTPUT_NAME!r}; found {sorted(outputs)}")
    features = np.asarray(outputs[name]).astype(np.float32, copy=False)
    if features.shape != shapes.output(name):
        raise PackageError(
            f"{name} should have shape {shapes.output(name)}, as config.json says; found {features.shape}: the package "
            "and config.json come from different exports"
        )
    if not np.isfinite(features).all():
        raise PackageError(
            f"{np.count_nonzero(~np.isfinite(features))} of {features.size} values of {name} are not finite: "
            "float16 overflows inside the package on this image; export it again"
        )
    return features
