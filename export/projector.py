"""The projector in torch: part of a package on request, and the reference that such a package is held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.checkpoint import Checkpoint, iter_float_tensors
from ..models.errors import WeightsError
from ..models.fastvit import conv_from

LAYERS = ("0", "2")
"""The linear layers' places in Apple's `mm_projector`; between them is a GELU."""


class ProjectorConvs(nn.Module):
    """Linear, exact GELU, Linear as 1x1 convolutions: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.linear_0 = first
        self.linear_2 = second

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ProjectorConvs:
        """In float32. Raises WeightsError when a tensor is not finite; shapes are checked with the decoder's."""
        return cls(*(_conv(checkpoint, f"model.mm_projector.{place}") for place in LAYERS)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_0(x)))


def projected(checkpoint: Checkpoint, image_features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the checkpoint's projector makes of each `image_features` (1, N, C): (1, N, D), float32."""
    projector = ProjectorConvs.from_checkpoint(checkpoint)
    with torch.inference_mode():
        columns = [torch.from_numpy(features).mT[..., None] for features in image_features]  # (1, C, N, 1)
        return [projector(column)[..., 0].mT.numpy() for column in columns]


def _conv(checkpoint: Checkpoint, layer: str) -> nn.Conv2d:
    parameters = []
    for name, values in iter_float_tensors(checkpoint, (f"{layer}.weight", f"{layer}.bias"), "pt"):
        parameters.append(torch.as_tensor(values).float())
        if not torch.isfinite(parameters[-1]).all():
            raise WeightsError(f"{name} holds NaN or infinite values: the checkpoint is damaged")
    weight, bias = parameters
    return conv_from(weight[:, :, None, None], bias, stride=1, groups=1)
