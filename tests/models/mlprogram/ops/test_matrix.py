"""Products of matrices, attention and LSTM, compared with coremltools' value inference, numpy and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram.ops import matrix

Agree = Callable[..., None]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=15)
@given(
    batches=st.sampled_from([((), ()), ((2,), (2,)), ((2, 3), (3,)), ((1,), (4,)), ((2, 1), (2, 3))]),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    transpose_x=st.booleans(),
    transpose_y=st.booleans(),
)
def test_matmul_agrees(agree: Agree, batches: Any, sizes: Any, transpose_x: bool, transpose_y: bool) -> None:
    rows, inner, columns = sizes
    x = normal(1, *batches[0], *((inner, rows) if transpose_x else (rows, inner)))
    y = normal(2, *batches[1], *((columns, inner) if transpose_y else (inner, columns)))
    agree("matmul", x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y)


def test_linear_agrees(agree: Agree) -> None:
    agree("linear", x=normal(1, 2, 3, 4), weight=normal(2, 5, 4), bias=normal(3, 5))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nchw,nwhu->nchu", ((2, 3, 4, 5), (2, 5, 4, 6))),
        ("abcd,adce->abce", ((2, 3, 4, 5), (2, 5, 4, 6))),
        ("abc,cbd->abd", ((2, 3, 4), (4, 3, 5))),
    ],
)
def test_einsum_agrees_with_numpy(agree: Agree, equation: str, shapes: Any) -> None:
    values = [normal(i, *shape) for i, shape in enumerate(shapes)]
    agree("einsum", np.einsum(equation, *values), values=values, equation=equation)


@settings(max_examples=10)
@given(lengths=st.tuples(*[st.integers(1, 5)] * 2), mask=st.sampled_from(["none", "floats", "infinite", "bool"]))
def test_attention_agrees(agree: Agree, lengths: tuple[int, int], mask: str) -> None:
    queries, keys = lengths
    given = {"query": normal(1, 1, 2, queries, 4), "key": normal(2, 1, 2, keys, 4), "value": normal(3, 1, 2, keys, 3)}
    if mask != "none":
        given["attn_mask"] = normal(4, queries, keys)
    if mask == "infinite":
        given["attn_mask"] = np.where(np.arange(keys) > np.arange(queries)[:, None], -np.inf, 0).astype(np.float32)
    if mask == "bool":
        given["attn_mask"] = np.arange(keys) <= np.arange(queries)[:, None]
    agree("scaled_dot_product_attention", target="iOS18", **given)


def reordered(gates: torch.Tensor) -> np.ndarray:
    """Returns weights in MIL's order of gates: input, forget, output, cell. torch's has the cell before the output."""
    i, f, cell, output = gates.detach().numpy().reshape(4, -1, *gates.shape[1:])
    return np.concatenate([i, f, output, cell])


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("whole", [False, True])
def test_lstm_is_torchs(agree: Agree, direction: str, whole: bool) -> None:
    torch.manual_seed(0)
    ways = 2 if direction == "bidirectional" else 1
    lstm = torch.nn.LSTM(3, 5, bidirectional=ways == 2)
    x, h, c = torch.randn(4, 2, 3), torch.randn(ways, 2, 5), torch.randn(ways, 2, 5)
    with torch.no_grad():
        states, (last_h, last_c) = lstm(x, (h, c))
    parameters = {}
    for suffix, own in (("", "_l0"), ("_back", "_l0_reverse"))[:ways]:
        parameters[f"weight_ih{suffix}"] = reordered(getattr(lstm, f"weight_ih{own}"))
        parameters[f"weight_hh{suffix}"] = reordered(getattr(lstm, f"weight_hh{own}"))
        parameters[f"bias{suffix}"] = reordered(getattr(lstm, f"bias_ih{own}") + getattr(lstm, f"bias_hh{own}"))
    joined = [torch.cat(list(state), -1).numpy() for state in (h, c, last_h, last_c)]
    expected = [states.numpy() if whole else joined[2][None], joined[2], joined[3]]
    agree(
        "lstm", expected, x=x.numpy(), initial_h=joined[0], initial_c=joined[1], direction=direction,
        output_sequence=whole, **parameters,
    )  # fmt: skip


def test_reversed_sequence_of_states_is_refused(evaluate: Callable[..., Any]) -> None:
    given = {"initial_h": normal(2, 1, 2), "initial_c": normal(3, 1, 2), "weight_hh": normal(4, 8, 2)}
    with pytest.raises(PackageError, match="direction must be forward or bidirectional"):
        evaluate(
            "lstm", infer=False, x=normal(1, 4, 1, 3), weight_ih=normal(5, 8, 3), direction="reverse",
            output_sequence=True, **given,
        )  # fmt: skip


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_and_without_onednn_agree(
    gelu: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch, tolerance: Callable[[str], float]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(35, 16), torch.randn(48, 16), torch.randn(48) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected = torch.nn.functional.gelu(expected) if gelu else expected
    for packs in {matrix._packs(), False}:
        monkeypatch.setattr(matrix, "_packs", lambda packs=packs: packs)
        found = matrix.dense(weight, bias, gelu)(x)
        torch.testing.assert_close(
            found.double(), expected, atol=tolerance("op_float32") * float(expected.abs().max()), rtol=0
        )
