"""The vision encoder of a checkpoint as the package of an export: run, calibrated, rewritten, compressed, converted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._version import __version__
from ..models.checkpoint import Checkpoint
from ..models.fastvit import FastViT
from ..models.folder_layout import PACKAGE_NAME
from ..quant.activations import int8_scales
from ..quant.calibration import ImageSet, calibration_images, trial_images, verification_images
from ..quant.encoder import convolutions, plan_of, quantize, stored_by_plan, stored_uniformly
from ..quant.encoder_scheme import MIXED, EncoderScheme
from ..quant.schemes import W8A8, StoredWeight
from ..quant.search import Images, SearchResult, measured_options, search, search_bytes
from .coreml import convert_encoder
from .encoder_reference import EncoderReference, encoder_reference, reference_features
from .options import OnStage
from .recipe import PackageInterface, Recipe
from .rewrite import (
    EngineAttentionBlock,
    ProjectorConvs,
    TokensLast,
    branch_convolutions,
    rewrite,
    stream_maxima,
    stream_scales,
)

if TYPE_CHECKING:
    from ..models._mlx import mx

PROBE_SIZE = 256
"""The side in pixels of the images that `mixed` measures on. FastViTHD runs 107 times, and 1024 px would take 16 times
as long."""

BYTES_PER_CONVOLUTION = 2048
"""The bytes of a package per convolution besides its weight: program text and gaps. The tiny encoder has 1844."""


@dataclass(frozen=True)
class WrittenEncoder:
    """The results of writing the encoder that later steps of an export read."""

    images: ImageSet
    """The images for verification."""
    reference: EncoderReference
    """The results of the checkpoint's own encoder for `images`."""
    calibration: ImageSet
    calibration_features: list[np.ndarray]
    """`image_features` of the calibration images. Empty unless the decoder's scheme needs them."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """The scheme of each convolution's weight."""
    stream_scales: Sequence[float] = ()
    """The power of two by which each stage's residual stream was scaled. It is 1 if float16 holds the stream."""
    int8_inputs: Mapping[str, np.float16] = field(default_factory=dict)
    """The scale of each convolution's input with w8a8."""
    tensors: Iterable[tuple[str, mx.array]] = ()
    """The encoder's tensors for `model.safetensors`, with `encoder="mlx"`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user, one line each."""
        scaled = [f"stage {i} by {scale:g}" for i, scale in enumerate(self.stream_scales) if scale != 1]
        rescaled = f"the residual stream was rescaled, exactly, to fit float16: {', '.join(scaled)}"
        return (*self.calibration.notes, *([rescaled] if scaled else []))

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries about the choices that were made."""
        scales = {name: float(scale) for name, scale in self.int8_inputs.items()}
        found = {"stream_scales": list(self.stream_scales), "calibration": self.calibration.as_dict()}
        return {**found, "int8_inputs": scales} if scales else found


def write_encoder(
    folder: Path, checkpoint: Checkpoint, recipe: Recipe, calibration: ImageSet, on_stage: OnStage
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
    return WrittenEncoder(
        images,
        reference,
        calibration,
        calibration_features,
        plan=plan_of(network, stored),
        stream_scales=scales,
        int8_inputs=int8_inputs,
    )


def rewritten(
    encoder: FastViT, checkpoint: Checkpoint, image_size: int, interface: PackageInterface, scales: Sequence[float]
) -> nn.Sequential:
    """Returns the network that the package is made from, with its weights uncompressed."""
    projector = ProjectorConvs.from_checkpoint(checkpoint) if interface.with_projector else None
    with torch.no_grad():  # inference mode's tensors could be neither changed nor traced
        return rewrite(encoder, image_size, scales, pixel_scale=interface.pixel_scale, projector=projector)


def encoder_weights(
    network: nn.Sequential,
    scheme: EncoderScheme,
    calibration: Sequence[np.ndarray],
    *,
    pixel_scale: float = 1.0,
    on_stage: OnStage,
) -> dict[str, StoredWeight]:
    """Returns the compressed weights by the names of their convolutions in `network`, which is not changed.

    Raises:
        UsageError: a recipe is for another encoder, or `max_bytes` is less than the fewest bits need.
    """
    if scheme.weights:
        scheme.check_names(convolutions(network))
        return stored_by_plan(network, scheme.weights)
    if scheme.quant == MIXED:
        return stored_by_plan(network, searched(network, scheme, calibration, pixel_scale, on_stage).plan)
    return stored_uniformly(network, "int8" if scheme.quant == W8A8 else scheme.quant)


def searched(
    network: nn.Sequential,
    scheme: EncoderScheme,
    calibration: Sequence[np.ndarray],
    pixel_scale: float,
    on_stage: OnStage,
) -> SearchResult:
    """Searches the plan of a `mixed` export."""
    image_size = calibration[0].shape[-1]
    probe_size = min(PROBE_SIZE, image_size)
    on_stage("measure what each weight's rounding costs")
    with resized_inputs(network, image_size, probe_size):
        options = measured_options(network, [pixel_scale * image for image in calibration_images(probe_size)])
    images = Images(calibration, [pixel_scale * image for image in trial_images(image_size)])
    fixed = fixed_bytes(network, options)
    if scheme.max_bytes is None:
        assert scheme.min_snr is not None
        return search(network, options, images, min_snr=scheme.min_snr, fixed_bytes=fixed, on_stage=on_stage)
    return search_bytes(network, options, images, max_bytes=scheme.max_bytes, fixed_bytes=fixed)


@contextlib.contextmanager
def resized_inputs(network: nn.Module, image_size: int, other_size: int) -> Iterator[None]:
    """Lets a network that was written for images of `image_size` take images of `other_size` inside the block."""
    attention = [module for module in network.modules() if isinstance(module, EngineAttentionBlock)]
    last = [module for module in network.modules() if isinstance(module, TokensLast)]
    grids, positions = [block.grid for block in attention], [module.positions for module in last]
    for block, grid in zip(attention, grids, strict=True):
        block.grid = grid * other_size // image_size
    for module, count in zip(last, positions, strict=True):
        module.positions = count * other_size**2 // image_size**2
    try:
        yield
    finally:
        for block, grid in zip(attention, grids, strict=True):
            block.grid = grid
        for module, count in zip(last, positions, strict=True):
            module.positions = count


def fixed_bytes(network: nn.Module, options: Mapping[str, object]) -> int:
    """Returns the bytes of a package besides the weights that a plan chooses for."""
    chosen = {f"{name}.weight" for name in options}
    rest = sum(2 * tensor.numel() for name, tensor in network.named_parameters() if name not in chosen)
    return rest + BYTES_PER_CONVOLUTION * len(convolutions(network))
