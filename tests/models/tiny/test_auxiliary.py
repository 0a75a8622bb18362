"""The auxiliary losses: the teacher's tokens and their imitation."""

from __future__ import annotations

import pytest
import torch

from fastvlm.models.tiny.auxiliary import TOKEN_GROUPS, Teacher, imitation_loss
from fastvlm.models.tiny.data import (
    Batches,
)


def test_imitation_loss_is_the_unexplained_variance(tokenizer_json: str) -> None:
    tokens = Batches(tokenizer_json, range(8), 8, 1)[0].tokens
    taught = Teacher()(tokens)
    assert imitation_loss(taught, taught, tokens).item() == 0
    filled = tokens.any(-1)
    off = taught + torch.where(filled, 2.0, 0.0)[..., None] * taught.std()
    assert imitation_loss(off, taught, tokens).item() == pytest.approx(2.0)  # 4 for filled tokens, 0 for empty ones


def test_teacher_separates_all_classes() -> None:
    teacher = Teacher()
    for column, classes in enumerate(TOKEN_GROUPS):
        tokens = torch.zeros(classes, 1, len(TOKEN_GROUPS), dtype=torch.long)
        tokens[:, 0, column] = torch.arange(classes)
        distances = torch.cdist(teacher(tokens)[:, 0], teacher(tokens)[:, 0]) + torch.eye(classes) * 1e3
        assert distances.min() > 1
