"""The vision encoder of a folder that holds it in MLX, beside the decoder, and not as a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..models._mlx import mx
from ..models.errors import PackageError
from ..models.fastvit_mlx import FastViTMLX
from ..models.folder_layout import OUTPUT_NAME, saved_encoder
from .encoders import Shapes, check_pixels, checked_features

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MLXEncoder:
    """FastViT in MLX: on Metal or CUDA where there is one, else on the CPU in float32.

    Raises:
        WeightsError: its tensors are not a whole encoder.
        PackageError: its width is not what `config.json` says.
    """

    name = "mlx"
    projected = False
    compile_ms = 0.0

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self._shapes = shapes
        self._encoder = FastViTMLX.from_tensors(saved_encoder(folder))
        self.image_size = shapes.image_size
        channels = self._encoder.config.out_channels
        if channels != shapes.channels:
            raise PackageError(
                f"the encoder in {folder} gives {channels} channels, but config.json says mm_hidden_size "
                f"{shapes.channels}: they come from different exports"
            )

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        check_pixels(pixel_values, self._shapes)
        return checked_features({OUTPUT_NAME: self._encoder(mx.array(pixel_values))}, self._shapes)
