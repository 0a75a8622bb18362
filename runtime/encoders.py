"""The vision encoder of a model folder, behind one interface: `pixel_values` -> `image_features`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..models._coremltools import import_coremltools
from ..models.config import PATCH_SIZE
from ..models.errors import MachineError, PackageError, UsageError
from ..models.folder_layout import INPUT_NAME, OUTPUT_NAME
from .compiled_cache import CompiledCache, Compiler, Predict

if TYPE_CHECKING:
    from numpy.typing import NDArray


class VisionEncoder(Protocol):
    """What turns pixels into features.

    Attributes:
        name: `coreml` or `reference`.
        image_size: side of the square that it takes, in pixels.
        compile_ms: time of the first use of the package on this machine's engine; 0 when that was earlier.
    """

    name: str
    image_size: int
    compile_ms: float

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, 3, S, S) float32 in 0..1 -> (1, (S/64)^2, C) float32. Raises PackageError."""


def open_encoder(package: Path, vision: str | None, image_size: int, channels: int) -> VisionEncoder:
    """The package on the back end `vision`; None takes Core ML on a Mac and the reference executor elsewhere.

    Raises:
        UsageError: no such back end.
        MachineError: this machine has not got it.
        PackageError: the package cannot be read or compiled.
    """
    if vision is None:
        vision = "coreml" if sys.platform == "darwin" else "reference"
    if vision == "coreml":
        return CoreMLEncoder(package, image_size, channels, CoreMLTools())
    if vision == "reference":
        return ReferenceEncoder(package, image_size, channels)
    raise UsageError(f"vision should be 'coreml' or 'reference'; found {vision!r:.40}")


class ReferenceEncoder:
    """The package in the reference executor, which runs ML Programs on torch, in float32."""

    name = "reference"
    compile_ms = 0.0

    def __init__(self, package: Path, image_size: int, channels: int) -> None:
        from ..models.mlprogram.executor import Executor  # brings torch

        self.image_size = image_size
        self._channels = channels
        self._executor = Executor(package, precision="float32")

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        return encode_with(self._executor.run, pixel_values, self.image_size, self._channels)


class CoreMLEncoder:
    """The package in Core ML, on the Neural Engine and the CPU; compiled once per machine."""

    name = "coreml"

    def __init__(
        self, package: Path, image_size: int, channels: int, compiler: Compiler, cache: CompiledCache | None = None
    ) -> None:
        self.image_size = image_size
        self._channels = channels
        start = time.perf_counter()
        opened = (cache or CompiledCache()).open(package, compiler)
        self._predict: Predict = opened.predict
        self.compile_ms = 1000 * (time.perf_counter() - start) if opened.compiled_now else 0.0

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        return encode_with(self._predict, pixel_values, self.image_size, self._channels)


def encode_with(run: Predict, pixel_values: NDArray[np.float32], image_size: int, channels: int) -> NDArray[np.float32]:
    """`run` between a check of what goes in and one of what comes out. Raises PackageError."""
    if pixel_values.shape != (1, 3, image_size, image_size) or pixel_values.dtype != np.float32:
        raise PackageError(
            f"the encoder takes float32 of shape {(1, 3, image_size, image_size)}; found {pixel_values.dtype} of shape "
            f"{pixel_values.shape}"
        )
    outputs = run({INPUT_NAME: pixel_values})
    if OUTPUT_NAME not in outputs:
        raise PackageError(f"the package should have an output {OUTPUT_NAME!r}; found {sorted(outputs)}")
    features = np.asarray(outputs[OUTPUT_NAME]).astype(np.float32, copy=False)
    expected = (1, (image_size // PATCH_SIZE) ** 2, channels)
    if features.shape != expected:
        raise PackageError(
            f"{OUTPUT_NAME} should have shape {expected}, as config.json says; found {features.shape}: the package and "
            "config.json come from different exports"
        )
    if not np.isfinite(features).all():
        raise PackageError(
            f"{np.count_nonzero(~np.isfinite(features))} of {features.size} values of {OUTPUT_NAME} are not finite: "
            "float16 overflows inside the package on this image; export it again"
        )
    return features


class CoreMLTools:
    """Core ML itself, through coremltools; the only code here that needs a Mac.

    Raises:
        MachineError: this is no Mac.
    """

    _ct: Any
    version: str

    def __init__(self) -> None:
        if sys.platform != "darwin":
            raise MachineError("Core ML runs on macOS only; leave vision out, or use vision='reference'")
        import platform

        self.version = f"macOS {platform.mac_ver()[0]}"
        self._ct = import_coremltools()

    def compile(self, package: Path, destination: Path) -> None:
        self._ct.models.utils.compile_model(str(package), str(destination))

    def open(self, compiled: Path) -> Predict:
        units = self._ct.ComputeUnit.CPU_AND_NE
        model = self._ct.models.CompiledMLModel(str(compiled), compute_units=units)

        def predict(inputs: dict[str, Any]) -> dict[str, Any]:
            try:
                return model.predict(inputs)
            except RuntimeError as reason:
                raise PackageError(f"Core ML cannot run the package: {str(reason).splitlines()[0]}") from reason

        return predict
