"""Which bits the encoder's weights take in an export: of one scheme, searched, or as a recipe says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from ..quant.calibration import calibration_images, trial_images
from ..quant.encoder import convolutions, stored_by_plan, stored_uniformly
from ..quant.encoder_scheme import MIXED, EncoderScheme
from ..quant.schemes import W8A8, StoredWeight
from ..quant.search import Images, SearchResult, measured_options, search, search_bytes
from .rewrite import EngineAttentionBlock, TokensLast

PROBE_SIZE = 256
"""Side of the images that gains are measured on: 107 runs of FastViTHD, which take 16 times as long at 1024."""


def encoder_weights(
    network: nn.Sequential,
    scheme: EncoderScheme,
    calibration: Sequence[np.ndarray],
    *,
    pixel_scale: float = 1.0,
    on_stage: Callable[[str], None],
) -> dict[str, StoredWeight]:
    """The weights in fewer bits, by their convolutions' names in `network`, which stays as it is.

    Raises:
        UsageError: a recipe is for another encoder, or fewer bytes are wanted than the fewest bits take.
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
    on_stage: Callable[[str], None],
) -> SearchResult:
    """The plan of a `mixed` export."""
    image_size = calibration[0].shape[-1]
    probe_size = min(PROBE_SIZE, image_size)
    on_stage("measure what each weight's rounding costs")
    with taking(network, image_size, probe_size):
        options = measured_options(network, [pixel_scale * image for image in calibration_images(probe_size)])
    images = Images(calibration, [pixel_scale * image for image in trial_images(image_size)])
    others = fixed_bytes(network, options)
    if scheme.max_bytes is None:
        assert scheme.min_snr is not None
        return search(network, options, images, min_snr=scheme.min_snr, fixed_bytes=others, on_stage=on_stage)
    return search_bytes(network, options, images, max_bytes=scheme.max_bytes, fixed_bytes=others)


@contextlib.contextmanager
def taking(network: nn.Module, image_size: int, other_size: int) -> Iterator[None]:
    """Within, a network that was written for images of `image_size` takes images of `other_size`."""
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


BYTES_PER_CONVOLUTION = 2048
"""Of the program's text and the gaps between weights, with some room; the tiny encoder takes 1844."""


def fixed_bytes(network: nn.Module, options: Mapping[str, object]) -> int:
    """What a package takes besides the weights that a plan chooses for."""
    chosen = {f"{name}.weight" for name in options}
    rest = sum(2 * tensor.numel() for name, tensor in network.named_parameters() if name not in chosen)
    return rest + BYTES_PER_CONVOLUTION * len(convolutions(network))
