"""Auxiliary losses of `tiny` from the scenes' descriptions. Their modules are discarded after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CHARACTERS
from .network import DECODER, ENCODER
from .scenes import COLOURS, MAX_CHARACTERS, PLACES, SHAPES

TOKEN_GROUPS = (
    1 + len(SHAPES),
    1 + len(COLOURS),
    1 + len(PLACES),
    1 + len(PLACES),
    *[1 + len(CHARACTERS)] * MAX_CHARACTERS,
)
"""The number of classes of each column of `data.Batch.tokens`. Class 0 means that there is nothing."""


class Teacher(nn.Module):
    """Computes image tokens from a scene's description: each is the sum of learned vectors for its content.

    With these tokens the decoder learns to answer before the encoder can see. The encoder learns, through the
    projector, to compute the same tokens from pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        size = int(DECODER["hidden_size"])
        self.tables = nn.ModuleList(nn.Embedding(classes, size) for classes in TOKEN_GROUPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (B, 16, D) for `data.Batch.tokens` (B, 16, 8)."""
        return torch.stack([table(column) for table, column in zip(self.tables, tokens.unbind(-1), strict=True)]).sum(0)


def imitation_loss(projected: Tensor, taught: Tensor, tokens: Tensor) -> Tensor:
    """Returns the squared error of the projector's tokens (B, 16, D) as a share of the teacher's variance."""
    taught = taught.detach()
    error = (projected - taught).square().mean(-1) / taught.var()  # (B, 16)
    return balanced(error, tokens.any(-1))


class TokensHead(nn.Module):
    """Classifies the content of each image token from the encoder's features, with one layer for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(ENCODER.out_channels, sum(TOKEN_GROUPS))

    def forward(self, image_features: Tensor, tokens: Tensor) -> Tensor:
        """Returns the sum of the groups' cross-entropies for `image_features` (B, 16, C) and `tokens` (B, 16, 8)."""
        logits = self.classes(image_features).flatten(0, 1).split(TOKEN_GROUPS, 1)  # (B * 16, classes) each
        targets = tokens.flatten(0, 1).unbind(1)  # (B * 16,) each
        return torch.stack([balanced(F.cross_entropy(found, target, reduction="none"), target > 0)
                            for found, target in zip(logits, targets, strict=True)]).sum()  # fmt: skip


class CellsHead(nn.Module):
    """Classifies what covers each cell from the third stage's features. Each image has many examples."""

    groups = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(CHARACTERS))

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(ENCODER.embed_dims[2], sum(self.groups), 1)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """Returns the sum of the cross-entropies of shape, colour and character.

        `features` are (B, 64, 16, 16), and `cells` are `data.Batch.cells` (B, 3, 16, 16).
        """
        logits = self.classes(features).split(self.groups, 1)
        losses = []
        for found, target in zip(logits, cells.unbind(1), strict=True):
            loss = F.cross_entropy(found, target, reduction="none")  # (B, 16, 16)
            losses.append(balanced(loss, target > 0))
        return torch.stack(losses).sum()


def balanced(loss: Tensor, filled: Tensor) -> Tensor:
    """Returns the average of the mean losses of filled and of empty positions, because filled ones are few."""
    return (loss[filled].sum() / filled.sum().clamp(min=1) + loss[~filled].sum() / (~filled).sum().clamp(min=1)) / 2
