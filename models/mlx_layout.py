"""Names and shapes of mlx-vlm's FastVLM (also mlx-community's folders), next to Apple's LLaVA layout.

Convolutions are channels-last, layer scales stand on the last axis, and the stem's blocks are a list of their own.
Source: `mlx_vlm/models/fastvlm` of https://github.com/Blaizzy/mlx-vlm.
"""

from __future__ import annotations

from collections.abc import Mapping

from .apple_layout import APPLE_ENCODER_PREFIX, Shape

ENCODER_PREFIX = "vision_tower.vision_model."
HEAD_PROJECTION = "head.proj"
"""CLIP's head, (channels, projection_dim): unused by FastVLM, but clients load strictly and expect it."""
UNUSED_ENCODER_TENSORS = ("head.",)
PROJECTION_DIM = 768

PREFIXES = (
    (f"{APPLE_ENCODER_PREFIX}patch_embed.", f"{ENCODER_PREFIX}patch_embed.blocks."),
    (APPLE_ENCODER_PREFIX, ENCODER_PREFIX),
    ("model.mm_projector.", "mm_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
"""Apple's prefix -> mlx-vlm's; the first that fits counts."""


def mlx_name(apple_name: str) -> str:
    """What mlx-vlm calls a tensor of Apple's layout."""
    return _renamed(apple_name, PREFIXES)


def apple_name(mlx_name: str) -> str:
    """What Apple's layout calls a tensor of mlx-vlm's."""
    return _renamed(mlx_name, tuple((mlx, apple) for apple, mlx in PREFIXES))


def _renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def to_mlx_axes(shape: Shape) -> tuple[int, ...]:
    """The order of the axes of one of Apple's encoder tensors in mlx-vlm's file."""
    if len(shape) == 4:
        return 0, 2, 3, 1  # (out, in, K, K) -> (out, K, K, in)
    return (1, 2, 0) if len(shape) == 3 else tuple(range(len(shape)))  # a layer scale (C, 1, 1) -> (1, 1, C)


def to_apple_axes(shape: Shape) -> tuple[int, ...]:
    """The order of the axes of one of mlx-vlm's encoder tensors in Apple's file."""
    if len(shape) == 4:
        return 0, 3, 1, 2  # (out, K, K, in) -> (out, in, K, K)
    return (2, 0, 1) if len(shape) == 3 else tuple(range(len(shape)))  # (1, 1, C) -> (C, 1, 1)


def encoder_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Apple's names (without the tower's prefix) and shapes of an encoder's tensors in mlx-vlm's, prefix off too."""
    return {
        apple_name(ENCODER_PREFIX + name).removeprefix(APPLE_ENCODER_PREFIX): tuple(
            shape[axis] for axis in to_apple_axes(shape)
        )
        for name, shape in shapes.items()
    }
