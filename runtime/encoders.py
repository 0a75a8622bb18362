"""The vision encoders behind one interface: `pixel_values` -> `image_features`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..models.blas import release_torch_threads
from ..models.config import PATCH_SIZE, FastVLMConfig
from ..models.errors import PackageError
from ..models.folder_layout import EMBEDS_NAME, OUTPUT_NAME, saved_encoder
from ..models.mlprogram import Program, read_package
from ..models.mlprogram.program import inputs_for
from .compiled_cache import CompiledCache, Compiler, Predict
from .timings import LapClock

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..models.mlprogram.executor import Precision

OnWait = Callable[[str, float], None]
"""Called with the reason that loading takes long, and the seconds so far."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of a package's input and outputs according to `config.json`."""

    image_size: int
    """The side of the input square, in pixels."""
    channels: int
    """The width of `image_features`."""
    hidden_size: int
    """The width of `image_embeds`, the output of a package with the projector."""

    @classmethod
    def of(cls, config: FastVLMConfig) -> Shapes:
        """Returns the sizes that a model's configuration gives."""
        return cls(config.image_size, config.mm_hidden_size, config.decoder.hidden_size)

    def output(self, name: str) -> tuple[int, int, int]:
        """Returns the shape of an output: (1, tokens, width)."""
        width = self.hidden_size if name == EMBEDS_NAME else self.channels
        return 1, (self.image_size // PATCH_SIZE) ** 2, width


class VisionEncoder(Protocol):
    """A vision encoder on some backend."""

    @property
    def name(self) -> str:
        """The backend: `coreml`, `reference` or `mlx`."""

    @property
    def image_size(self) -> int:
        """The side of the input square, in pixels."""

    @property
    def projected(self) -> bool:
        """True if the package has the projector, so that its output goes into the decoder directly."""

    @property
    def compile_ms(self) -> float:
        """The time of the package's first use on this machine's engine, 0 for later uses."""

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (1, 3, S, S) float32 in 0..1 to (1, (S/64)^2, C or D) float32. Raises PackageError."""


class PendingFeatures(Protocol):
    """The features of an image that is being encoded."""

    @property
    def done(self) -> bool:
        """True if `result` returns or raises without waiting."""

    @property
    def predict_ms(self) -> float:
        """The time of the image inside the encoder, 0 before it is done."""

    def result(self) -> NDArray[np.float32]:
        """Waits for the features and returns them. Raises as `encode` does."""


@runtime_checkable
class SeparateEncoder(Protocol):
    """A `VisionEncoder` that works in parallel with this process."""

    def room(self) -> int:
        """Returns the number of images that `submit` accepts without waiting."""

    def submit(self, pixel_values: NDArray[np.float32]) -> PendingFeatures:
        """Starts to encode an image and returns its pending features. Raises as `encode` does."""

    def wait_ready(self) -> None:
        """Waits until the package is loaded. Raises PackageError or MachineError if it cannot be."""

    def close(self) -> None:
        """Ends the encoder's process."""


def close_encoder(encoder: VisionEncoder) -> None:
    """Ends the encoder's process if it has one."""
    if isinstance(encoder, SeparateEncoder):
        encoder.close()


class ReferenceEncoder:
    """A package in the reference executor, which runs ML Programs on torch, in float32 or with float16's rounding."""

    name = "reference"
    compile_ms = 0.0

    def __init__(self, package: Path, shapes: Shapes, precision: Precision = "float32") -> None:
        from ..models.mlprogram.executor import Executor  # imports torch

        self._shapes = shapes
        self._executor = Executor(package, precision=precision)
        release_torch_threads()
        self.image_size = shapes.image_size
        self.projected = is_projected(self._executor.program)

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (1, 3, S, S) float32 in 0..1 to (1, (S/64)^2, C or D) float32. Raises PackageError."""
        check_pixels(pixel_values, self._shapes)
        outputs = self._executor.run(inputs_for(self._executor.program, pixel_values))
        release_torch_threads()
        return checked_features(outputs, self._shapes)


PINNED_REFERENCES = 2**20
"""The number of references that are kept to the array that Core ML reads.

coremltools' wheels up to 9.0 drop theirs about a second after `predict`, in a thread without the GIL. The count may
drift by one for each image, and a count of zero would crash the process.
"""


class CoreMLEncoder:
    """A package in Core ML, compiled once per machine and run once here, so that the first image does not wait.

    `on_stage` is called with `open` and `warm` when these stages start.

    Attributes:
        open_ms: the time of loading the compiled copy, with compiling if there was none.
        first_predict_ms: the time of the first run, on zeros.
        compiled: the compiled copy that Core ML has opened.
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
        """Maps (1, 3, S, S) float32 in 0..1 to (1, (S/64)^2, C or D) float32. Raises PackageError."""
        check_pixels(pixel_values, self._shapes)
        np.copyto(self._pixels, pixel_values)
        return self._encoded()

    def _encoded(self) -> NDArray[np.float32]:
        inputs: dict[str, Any] = dict(inputs_for(self._program, self._pixels))
        for name in self._program.image_inputs:
            inputs[name] = as_image(inputs[name])
        return checked_features(self._predict(inputs), self._shapes)


class MLXEncoder:
    """FastViT in MLX, for folders without a package: on Metal or CUDA if there is one, else on the CPU in float32.

    Raises:
        WeightsError: the tensors are not a whole encoder.
        PackageError: the encoder's width is not the one in `config.json`.
    """

    name = "mlx"
    projected = False
    compile_ms = 0.0

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        from ..models._mlx import mx  # other backends, and the child process, do without MLX
        from ..models.fastvit_mlx import FastViTMLX

        self._shapes, self._array = shapes, mx.array
        self._encoder = FastViTMLX.from_tensors(saved_encoder(folder))
        self.image_size = shapes.image_size
        channels = self._encoder.config.out_channels
        if channels != shapes.channels:
            raise PackageError(
                f"the encoder in {folder} must have the {shapes.channels} channels of mm_hidden_size in config.json "
                f"(got {channels}). They come from different exports. Export the model again."
            )

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps (1, 3, S, S) float32 in 0..1 to (1, (S/64)^2, C) float32. Raises PackageError."""
        check_pixels(pixel_values, self._shapes)
        return checked_features({OUTPUT_NAME: self._encoder(self._array(pixel_values))}, self._shapes)


def is_projected(program: Program) -> bool:
    """Returns True if the package has the projector."""
    return any(tensor.name == EMBEDS_NAME for tensor in program.outputs)


def as_image(pixels: NDArray[np.float32]) -> Image:
    """Returns (1, 3, S, S) in 0..255 as a PIL image, which coremltools needs for an image input."""
    from PIL.Image import fromarray

    return fromarray(pixels[0].astype(np.uint8).transpose(1, 2, 0))  # (S, S, 3)


def check_pixels(pixel_values: NDArray[np.float32], shapes: Shapes) -> None:
    """Raises PackageError unless the pixels are (1, 3, S, S) float32."""
    expected = (1, 3, shapes.image_size, shapes.image_size)
    if pixel_values.shape != expected or pixel_values.dtype != np.float32:
        raise PackageError(
            f"the encoder's input must be float32 of shape {expected}, got {pixel_values.dtype} of shape "
            f"{pixel_values.shape}"
        )


def checked_features(outputs: Mapping[str, Any], shapes: Shapes) -> NDArray[np.float32]:
    """Returns the package's output as float32. Raises PackageError if it is missing, misshapen or not finite."""
    name = EMBEDS_NAME if EMBEDS_NAME in outputs else OUTPUT_NAME
    if name not in outputs:
        raise PackageError(f"the package must have an output {OUTPUT_NAME!r} (got {sorted(outputs)})")
    features = np.asarray(outputs[name]).astype(np.float32, copy=False)
    if features.shape != shapes.output(name):
        raise PackageError(
            f"{name} must have the shape {shapes.output(name)} of config.json (got {features.shape}). The package and "
            "config.json come from different exports. Export the model again."
        )
    if not np.isfinite(features).all():
        raise PackageError(
            f"{np.count_nonzero(~np.isfinite(features))} of {features.size} values of {name} are not finite: "
            "float16 overflows inside the package on this image. Export the model again."
        )
    return features
