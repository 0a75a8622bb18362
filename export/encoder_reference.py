"""The checkpoint's encoder, run in float32: the reference for what an export computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..models.fastvit import FastViT
from ..models.fastvit_config import FastViTConfig

CONVOLUTIONS = {"stem": 3, "downsampling": 2, "repmixer": 4, "attention": 5}
"""The number of convolutions in each part of the rewritten encoder. A stage's last one is the last to write its
residual stream."""


@dataclass(frozen=True)
class EncoderReference:
    """The results of the checkpoint's encoder, float32."""

    features: list[np.ndarray]
    """`image_features` (1, N, C) of each image."""
    stages: dict[str, np.ndarray]
    """The results (1, C, H, W) of the stem and of each stage for the first image."""
    last_convolutions: dict[str, int]
    """The place of each one's last convolution in the rewritten encoder."""


def encoder_reference(encoder: FastViT, images: Sequence[np.ndarray]) -> EncoderReference:
    """Runs the checkpoint's encoder on `images`, (1, 3, S, S) each."""
    features: list[np.ndarray] = []
    stages: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for image in images:
            x = encoder.patch_embed(torch.from_numpy(image))
            found = {"stem": x}
            for part in encoder.network:
                x = part(x)
                if isinstance(part, nn.Sequential):
                    found[f"stage {len(found) - 1}"] = x
            features.append(encoder.features(x).numpy())
            stages = stages or {name: tensor.numpy() for name, tensor in found.items()}
    return EncoderReference(features, stages, last_convolutions(encoder.config))


def reference_features(encoder: FastViT, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns `image_features` (1, N, C) of each image, float32."""
    with torch.inference_mode():
        return [encoder(torch.from_numpy(image)).numpy() for image in images]


def last_convolutions(config: FastViTConfig) -> dict[str, int]:
    """Returns the place of the last convolution of the stem and of each stage, in the order of the computation."""
    count = CONVOLUTIONS["stem"]
    places = {"stem": count - 1}
    for index, (depth, mixer, kernel) in enumerate(
        zip(config.depths, config.token_mixers, config.pos_emb_kernels, strict=True)
    ):
        count += CONVOLUTIONS["downsampling"] if index else 0
        count += depth * CONVOLUTIONS[mixer] + (kernel is not None)
        places[f"stage {index}"] = count - 1
    return places
