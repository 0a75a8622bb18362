"""The vision encoder of a checkpoint as the package of an export: run, calibrated, rewritten, compressed, converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._version import __version__
from ..models.checkpoint import Checkpoint
from ..models.fastvit import FastViT
from ..models.folder_layout import PACKAGE_NAME
from ..quant.activations import int8_scales
from ..quant.calibration import ImageSet, verification_images
from ..quant.encoder import plan_of, quantize
from ..quant.schemes import W8A8
from .coreml import convert_encoder
from .encoder_weights import encoder_weights
from .interface import Interface
from .projector import ProjectorConvs
from .recipe import Recipe
from .rewrite import branch_convolutions, rewrite, stream_maxima, stream_scales
from .verify_encoder import EncoderReference, encoder_reference, reference_features

if TYPE_CHECKING:
    from ..models._mlx import mx


@dataclass(frozen=True)
class WrittenEncoder:
    """What the later steps need to know of the encoder that was written."""

    images: ImageSet
    """For verification."""
    reference: EncoderReference
    """What the checkpoint's own encoder makes of them."""
    calibration: ImageSet
    calibration_features: list[np.ndarray]
    """Its features of the calibration images, where the decoder's scheme needs them."""
    plan: dict[str, str]
    """The scheme of each convolution's weight."""
    stream_scales: list[float]
    """Power of two by which each stage's residual stream was scaled; 1 where it fits float16 as it is."""
    int8_inputs: dict[str, np.float16]
    """Of w8a8: the scale of each convolution's input."""
    tensors: Iterable[tuple[str, mx.array]] = ()
    """Of `--layout mlx`: what `model.safetensors` holds of the encoder, in place of a package."""

    @property
    def notes(self) -> tuple[str, ...]:
        scaled = [f"stage {i} by {scale:g}" for i, scale in enumerate(self.stream_scales) if scale != 1]
        rescaled = f"the residual stream was rescaled, exactly, to fit float16: {', '.join(scaled)}"
        return (*self.calibration.notes, *([rescaled] if scaled else []))

    def as_dict(self) -> dict[str, Any]:
        """What a manifest's recipe says of the choices that were made."""
        scales = {name: float(scale) for name, scale in self.int8_inputs.items()}
        found = {"stream_scales": self.stream_scales, "calibration": self.calibration.as_dict()}
        return {**found, "int8_inputs": scales} if scales else found


def write_encoder(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: ImageSet,
    on_stage: Callable[[str], None],
) -> WrittenEncoder:
    """Reparameterizes, folds, converts and compresses the vision encoder into the package in `folder`."""
    on_stage("load the encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    on_stage("run the checkpoint's encoder")
    images = verification_images(recipe.image_size)
    reference = encoder_reference(encoder, images)
    on_stage("calibrate")
    with torch.inference_mode():
        scales = stream_scales(stream_maxima(encoder, map(torch.from_numpy, calibration)))
    network = rewritten(encoder, checkpoint, recipe.image_size, recipe.interface, scales)
    calibration_features = reference_features(encoder, calibration) if recipe.decoder.needs_calibration else []
    del encoder
    pixel_scale = recipe.interface.pixel_scale
    fed = calibration.scaled(pixel_scale)
    on_stage("compress the encoder's weights")
    stored = encoder_weights(network, recipe.encoder, fed, pixel_scale=pixel_scale, on_stage=on_stage)
    quantize(network, stored, fed)
    int8_inputs = int8_scales(network, branch_convolutions(network), fed) if recipe.quant == W8A8 else {}
    convert_encoder(
        network,
        recipe.image_size,
        stored,
        folder / PACKAGE_NAME,
        metadata={"fastvlm.version": __version__, "fastvlm.quant": recipe.quant},
        on_stage=on_stage,
        interface=recipe.interface,
        int8_inputs=int8_inputs,
    )
    plan = plan_of(network, stored)
    return WrittenEncoder(images, reference, calibration, calibration_features, plan, scales, int8_inputs)


def rewritten(
    encoder: FastViT, checkpoint: Checkpoint, image_size: int, interface: Interface, scales: Sequence[float]
) -> torch.nn.Sequential:
    """The network that the package is made from, before its weights are compressed."""
    projector = ProjectorConvs.from_checkpoint(checkpoint) if interface.with_projector else None
    with torch.no_grad():  # not inference mode, whose tensors cannot be given other values and then be traced
        return rewrite(encoder, image_size, scales, pixel_scale=interface.pixel_scale, projector=projector)
