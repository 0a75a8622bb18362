"""The embedded images: drawn, seeded, the same on every machine.

Exports are calibrated on some and verified on others.

They are not photographs, but they hold what photographs do: smooth shading, hard edges, fine texture, dark and bright.
"""

from __future__ import annotations

import numpy as np

CALIBRATION_SEEDS = (0, 1)
VERIFICATION_SEEDS = (100, 101)


def calibration_images(image_size: int) -> list[np.ndarray]:
    """Images to measure ranges and means on, each `pixel_values` (1, 3, S, S) float32 RGB in 0..1, NCHW."""
    return [_scene(image_size, seed)[None] for seed in CALIBRATION_SEEDS]


def verification_images(image_size: int) -> list[np.ndarray]:
    """Images to judge an export by, of the same form, which no calibration has seen."""
    return [_scene(image_size, seed)[None] for seed in VERIFICATION_SEEDS]


def _scene(size: int, seed: int) -> np.ndarray:
    """(3, S, S) float32: a shaded background, discs and boxes of flat colour, a textured quarter."""
    draw = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size  # (S, S) each
    light, dark = draw.random((2, 3, 1, 1), dtype=np.float32)
    angle = draw.random() * 2 * np.pi
    shade = 0.5 + 0.5 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
    image = dark + (light - dark) * shade  # (3, S, S)
    for _ in range(8):
        (cx, cy), radius = draw.random(2), 0.05 + 0.15 * draw.random()
        inside = np.hypot(x - cx, y - cy) < radius
        if draw.random() < 0.5:
            inside = np.maximum(abs(x - cx), abs(y - cy)) < radius
        image = np.where(inside, draw.random((3, 1, 1), dtype=np.float32), image)
    texture = draw.random((3, size, size), dtype=np.float32)
    stripes = (np.sin(x * size * draw.uniform(0.3, 2.0)) > 0).astype(np.float32)
    image = np.where((x > 0.5) & (y > 0.5), texture, image)
    image = np.where((x < 0.25) & (y > 0.75), stripes, image)
    return np.round(image * 255).clip(0, 255).astype(np.float32) / 255
