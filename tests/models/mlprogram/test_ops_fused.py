"""The fused operations, compared with torch's separate ones in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastvlm.models.mlprogram import Constants, Operation, Program, TensorType, Value, ops_fused
from fastvlm.models.mlprogram.binding import Parameters
from fastvlm.models.mlprogram.ops_fused import ATTENTION, FEED_FORWARD, FEED_FORWARD_ADD, FUSED_KINDS

SHAPE = (1, 4, 5, 7)


def bind(kind: str, **constants: torch.Tensor) -> Callable[..., torch.Tensor]:
    values = {name: Value(TensorType(name, "fp32", tuple(c.shape)), c.numpy()) for name, c in constants.items()}
    operation = Operation(kind, "fused", {name: (value,) for name, value in values.items()}, {}, ())
    program = Program((), (), (), 8, "CoreML7", {}, Path("made up"), {})
    return FUSED_KINDS[kind].bind(Parameters(operation, Constants(program)))


@pytest.mark.parametrize("rows", [1, 8, 1000])  # of 35 positions
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", [FEED_FORWARD, FEED_FORWARD_ADD])
def test_feed_forward_equals_convolutions_around_gelu(
    kind: str, has_bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch, tolerance: Callable[[str], float]
) -> None:
    monkeypatch.setattr(ops_fused, "ROWS_AT_ONCE", rows)
    torch.manual_seed(0)
    weights = {"weight_1": torch.randn(12, 4, 1, 1), "weight_2": torch.randn(6, 12, 1, 1)}
    biases = {"bias_1": torch.randn(12), "bias_2": torch.randn(6)} if has_bias else {}
    x, y = torch.randn(SHAPE), torch.randn(1, 6, 5, 7)
    added = kind == FEED_FORWARD_ADD
    found = bind(kind, **weights, **biases)(*([x, y] if added else [x]))

    d: dict[str, Any] = {name: tensor.double() for name, tensor in {**weights, **biases}.items()}
    expected = F.conv2d(F.gelu(F.conv2d(x.double(), d["weight_1"], d.get("bias_1"))), d["weight_2"], d.get("bias_2"))
    expected = expected + y.double() if added else expected
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert found.shape == expected.shape
    assert float(error) <= tolerance("op_float32")


def test_attention_equals_softmax_between_products(tolerance: Callable[[str], float]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, 10) for _ in range(3))  # (B, heads, head_dim, N)
    found = bind(ATTENTION)(query, key, value)
    weights = torch.softmax(query.double().mT @ key.double(), -1)
    expected = value.double() @ weights.mT
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance("op_float32") * float(expected.abs().max()), rtol=0)
