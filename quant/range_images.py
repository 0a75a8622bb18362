"""The images for the ranges of int8 inputs: the calibration images, and variations of them.

The range of a channel is its largest value in some image, so a few images do not show it. Tried on small encoders,
ranges of four images cost 3 to 8 dB on drawings that they had not seen. Variations have other crops, contrast,
brightness and colours, and the embedded images also get other drawings. All are drawn with fixed seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from ..models.images import preprocess
from ..models.tiny.scenes import draw_scene, scene_seeds
from .calibration import ImageSet, Kind, busy_picture, calibration_images

VARIATIONS = 12
"""The number of variations. Twice as many changed the noise by less than 1 dB."""

DRAWINGS = 4
"""The number of scenes, and of busy pictures, that are added to the embedded images."""

DRAWING_SEED, VARIATION_SEED = 300, 3
"""The seeds, which no other set of images uses."""

GAMMA_SPREAD, LEAST_CONTRAST, MOST_CONTRAST, MOST_SHIFT = 0.4, 0.6, 1.3, 0.1
"""The spread of the logarithm of gamma, and the bounds of contrast and brightness."""


def range_images(calibration: ImageSet, image_size: int) -> ImageSet:
    """Returns `calibration` at `image_size`, with its variations. Embedded images are drawn at that size."""
    if calibration.source == "embedded":
        base = replace(calibration_images(image_size), scale=calibration.scale)
        drawn = [preprocess(draw_scene(seed).image(), image_size, "pad") for seed in
                 scene_seeds("calibration", DRAWINGS, start=DRAWING_SEED)]  # fmt: skip
        drawn += [busy_picture(image_size, DRAWING_SEED + index) for index in range(DRAWINGS)]
        photographs = [pixels for pixels, kind in zip(base.pixels, base.kinds, strict=True) if kind == "photographs"]
    else:
        base = replace(calibration, pixels=tuple(resized(pixels, image_size) for pixels in calibration.pixels))
        drawn, photographs = [], list(base.pixels)
    draw = np.random.Generator(np.random.PCG64(VARIATION_SEED))
    varied = [variation(photographs[index % len(photographs)], draw) for index in range(VARIATIONS)]
    added = [*drawn, *varied]
    kinds: list[Kind] = ["drawings"] * len(drawn)
    kinds += [base.kinds[-1]] * len(varied)
    return replace(base, pixels=(*base.pixels, *added), kinds=(*base.kinds, *kinds))


def variation(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Returns a variation of `pixels` (3, S, S) uint8, of the same size: crop, mirror, colours, gamma and contrast."""
    size = pixels.shape[-1]
    side = int(draw.integers(size // 2, size + 1))
    top, left = draw.integers(0, size - side + 1, 2)
    cropped = resized(pixels[:, top : top + side, left : left + side], size)
    mirrored = cropped[:, :, ::-1] if draw.random() < 0.5 else cropped
    values = mirrored[draw.permutation(3)].astype(np.float32) / 255
    values = values ** np.float32(np.exp(GAMMA_SPREAD * draw.standard_normal()))
    contrast, shift = draw.uniform(LEAST_CONTRAST, MOST_CONTRAST), draw.uniform(-MOST_SHIFT, MOST_SHIFT)
    values = (values - 0.5) * np.float32(contrast) + np.float32(0.5 + shift)
    return np.rint(255 * values.clip(0, 1)).astype(np.uint8)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns `pixels` (3, S, S) uint8 as (3, size, size)."""
    if pixels.shape[-1] == size:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
