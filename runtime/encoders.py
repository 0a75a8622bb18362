"""The vision encoder of a model folder, behind one interface: `pixel_values` -> `image_features`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..models._coremltools import import_coremltools
from ..models.blas import release_torch_threads
from ..models.config import PATCH_SIZE, FastVLMConfig
from ..models.coreml_errors import coreml_reason
from ..models.errors import MachineError, PackageError, UsageError
from ..models.folder_layout import EMBEDS_NAME, OUTPUT_NAME, has_mlx_encoder
from ..models.mlprogram import Program, read_package
from ..models.mlprogram.program import inputs_for
from .compiled_cache import CompiledCache, Compiler, Predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


COMPUTE_UNITS = ("CPU_AND_NE", "CPU_ONLY", "CPU_AND_GPU", "ALL")
"""What Core ML may run a package on: the engine first."""

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

    name: str
    image_size: int
    projected: bool
    compile_ms: float

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, 3, S, S) float32 in 0..1 -> (1, (S/64)^2, C or D) float32. Raises PackageError."""


def open_encoder(package: Path, vision: str | None, shapes: Shapes, compute_units: str | None = None) -> VisionEncoder:
    """The package on the back end `vision`; None takes Core ML on a Mac and the reference executor elsewhere.

    Where there is no package, the folder holds the encoder in MLX, and `mlx` is the one back end. `compute_units` is
    one of COMPUTE_UNITS, for Core ML alone; None takes the first.

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
        from .mlx_encoder import MLXEncoder

        return MLXEncoder(package.parent, shapes)
    if vision == "coreml":
        return CoreMLEncoder(package, shapes, CoreMLTools(compute_units or COMPUTE_UNITS[0]))
    if vision == "reference":
        return ReferenceEncoder(package, shapes)
    raise UsageError(f"vision should be 'coreml', 'reference' or 'mlx'; found {vision!r:.40}")


def check_compute_units(vision: str, compute_units: str | None) -> None:
    """Raises UsageError unless they are Core ML's, and Core ML is what runs the package."""
    if compute_units is None:
        return
    if compute_units not in COMPUTE_UNITS:
        raise UsageError(f"compute_units should be one of {', '.join(COMPUTE_UNITS)}; found {compute_units!r:.40}")
    if vision != "coreml":
        raise UsageError(f"compute_units are Core ML's, and vision is {vision!r:.40} here: leave them out")


class ReferenceEncoder:
    """The package in the reference executor, which runs ML Programs on torch, in float32."""

    name = "reference"
    compile_ms = 0.0

    def __init__(self, package: Path, shapes: Shapes) -> None:
        from ..models.mlprogram.executor import Executor  # brings torch

        self._shapes = shapes
        self._executor = Executor(package, precision="float32")
        release_torch_threads()
        self.image_size = shapes.image_size
        self.projected = is_projected(self._executor.program)

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        check_pixels(pixel_values, self._shapes)
        outputs = self._executor.run(inputs_for(self._executor.program, pixel_values))
        release_torch_threads()
        return checked_features(outputs, self._shapes)


class CoreMLEncoder:
    """The package in Core ML, on the Neural Engine and the CPU; compiled once per machine."""

    name = "coreml"

    def __init__(self, package: Path, shapes: Shapes, compiler: Compiler, cache: CompiledCache | None = None) -> None:
        self._shapes = shapes
        self._program = read_package(package)
        self.image_size = shapes.image_size
        self.projected = is_projected(self._program)
        start = time.perf_counter()
        opened = (cache or CompiledCache()).open(package, compiler)
        self._predict: Predict = opened.predict
        self.compile_ms = 1000 * (time.perf_counter() - start) if opened.compiled_now else 0.0

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        check_pixels(pixel_values, self._shapes)
        inputs: dict[str, Any] = dict(inputs_for(self._program, pixel_values))
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


class CoreMLTools:
    """Core ML itself, through coremltools; the only code here that needs a Mac.

    Raises:
        MachineError: this is no Mac.
    """

    _ct: Any
    _compute_units: str
    version: str

    def __init__(self, compute_units: str = COMPUTE_UNITS[0]) -> None:
        if sys.platform != "darwin":
            raise MachineError("Core ML runs on macOS only; leave vision out, or use vision='reference'")
        import platform

        self.version = f"macOS {platform.mac_ver()[0]}"
        self._ct = import_coremltools()
        self._compute_units = compute_units

    def compile(self, package: Path, destination: Path) -> None:
        self._ct.models.utils.compile_model(str(package), str(destination))

    def open(self, compiled: Path) -> Predict:
        units = self._ct.ComputeUnit[self._compute_units]
        model = self._ct.models.CompiledMLModel(str(compiled), compute_units=units)

        def predict(inputs: dict[str, Any]) -> dict[str, Any]:
            try:
                return model.predict(inputs)
            except RuntimeError as reason:
                raise PackageError(f"Core ML cannot run the package: {coreml_reason(reason)}") from reason

        return predict
