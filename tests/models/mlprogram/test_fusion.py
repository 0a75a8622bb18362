"""Chains of operations that run as one: the same numbers, and unfused where a value inside is visible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastvlm.models.mlprogram import Constants, Operation, Program, TensorType, Value, fusion, read_package
from fastvlm.models.mlprogram.binding import Parameters
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.fusion import ATTENTION, FEED_FORWARD, FEED_FORWARD_ADD, FUSED_KINDS
from fastvlm.models.mlprogram.lowering import lower

DRAW = np.random.default_rng(0)
WIDE, NARROW, KERNEL = (DRAW.normal(size=shape) for shape in ((48, 16, 1, 1), (16, 48, 1, 1), (48, 16, 3, 3)))
SHAPE = (1, 16, 5, 7)


def mlp(mb: Any, x: Any, name: str, up: np.ndarray = WIDE, mode: str = "EXACT", bias: bool = True) -> tuple[Any, Any]:
    """Returns the hidden values before the GELU, and the result."""
    biases = [{"bias": DRAW.normal(size=len(weight))} if bias else {} for weight in (up, NARROW)]
    hidden = mb.conv(x=x, weight=up, pad_type="same", name=f"{name}_up", **biases[0])
    return hidden, mb.conv(x=mb.gelu(x=hidden, mode=mode), weight=NARROW, name=f"{name}_down", **biases[1])


def attention(mb: Any, x: Any, axis: int = -2, transpose: bool = False) -> Any:
    """Builds attention with scores of keys by queries, or of queries by keys with `transpose`."""
    query, key, value = mb.split(x=mb.reshape(x=x, shape=[1, 6, 8, 10]), num_splits=3, axis=1)  # (1, 2, 8, 10) each
    rows, columns = (query, key) if transpose else (key, query)
    weights = mb.softmax(x=mb.matmul(x=rows, y=columns, transpose_x=True), axis=axis)
    return mb.matmul(x=value, y=weights, transpose_y=transpose)


@pytest.fixture(scope="module")
def chains(save_program: Callable[..., Path]) -> Path:
    """A program with each chain of an encoder, and a residual that is read again."""

    def build(mb: Any, x: Any, tokens: Any) -> Any:
        source = mb.exp(x=x)
        added = mb.add(x=source, y=mlp(mb, mb.tanh(x=source), "added")[1], name="sum")
        plain = mlp(mb, added, "plain", bias=False)[1]
        transposed = attention(mb, tokens, axis=-1, transpose=True)
        return [mb.mul(x=source, y=plain, name="out"), attention(mb, tokens), attention(mb, tokens, axis=2), transposed]

    return save_program(build, {"x": SHAPE, "tokens": (1, 48, 2, 5)})


@pytest.fixture(scope="module")
def lookalikes(save_program: Callable[..., Path]) -> Path:
    """A program with operations that only look like chains."""

    def build(mb: Any, x: Any, tokens: Any) -> Any:
        seen, result = mlp(mb, x, "seen")
        spread = mlp(mb, x, "spread", up=KERNEL)[1]
        other_gelu = mlp(mb, x, "other_gelu", mode="TANH_APPROXIMATION")[1]
        return [
            mb.exp(x=seen),
            result,
            spread,
            other_gelu,
            attention(mb, tokens, axis=-1),
            attention(mb, tokens, axis=-2, transpose=True),
        ]

    return save_program(build, {"x": SHAPE, "tokens": (1, 48, 2, 5)})


def inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        "x": draw.normal(size=SHAPE).astype(np.float32),
        "tokens": draw.normal(size=(1, 48, 2, 5)).astype(np.float32),
    }


def kinds(package: Path, outputs: list[str] | None = None, fuse: bool = True) -> Counter[str]:
    program = read_package(package)
    names = outputs or [output.name for output in program.outputs]
    return Counter(instruction.operation.kind for instruction in lower(program, names, fuse).instructions)


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_fused_chains_compute_the_same(
    chains: Path, rows: int, monkeypatch: pytest.MonkeyPatch, tolerance: Callable[[str], float]
) -> None:
    monkeypatch.setattr(fusion, "ROWS_AT_ONCE", rows)  # of 35 positions
    found, expected = Executor(chains).run(inputs()), Executor(chains, record_ranges=True).run(inputs())
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=tolerance("op_float32") * np.abs(values).max(), rtol=0)


def test_chains_are_found_and_lookalikes_are_not(chains: Path, lookalikes: Path) -> None:
    found = kinds(chains)
    assert [found[kind] for kind in (FEED_FORWARD_ADD, FEED_FORWARD, ATTENTION)] == [1, 1, 3]
    assert not {"conv", "gelu", "softmax", "matmul", "add"} & found.keys()
    assert not {FEED_FORWARD_ADD, FEED_FORWARD, ATTENTION} & kinds(lookalikes).keys()
    assert not {FEED_FORWARD_ADD, FEED_FORWARD, ATTENTION} & kinds(chains, fuse=False).keys()


def test_output_inside_a_chain_is_computed(chains: Path) -> None:
    program = read_package(chains)
    hidden = next(o.outputs[0].name for o in program.operations if o.name == "added_up")
    assert kinds(chains, [hidden, "out"])[FEED_FORWARD_ADD] == 0
    found = Executor(chains, outputs=[hidden, "out"]).run(inputs())
    assert found[hidden].shape == (1, 48, 5, 7)
    np.testing.assert_allclose(found["out"], Executor(chains).run(inputs())["out"], rtol=1e-4, atol=1e-4)


def test_rounding_and_ranges_cover_every_operation(chains: Path) -> None:
    for options in ({"precision": "float16"}, {"record_ranges": True}):
        executor = Executor(chains, **options)
        assert {i.operation.kind for i in executor._plan.instructions} >= {"conv", "gelu", "softmax", "matmul"}


FUSED_SHAPE = (1, 4, 5, 7)


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
    monkeypatch.setattr(fusion, "ROWS_AT_ONCE", rows)
    torch.manual_seed(0)
    weights = {"weight_1": torch.randn(12, 4, 1, 1), "weight_2": torch.randn(6, 12, 1, 1)}
    biases = {"bias_1": torch.randn(12), "bias_2": torch.randn(6)} if has_bias else {}
    x, y = torch.randn(FUSED_SHAPE), torch.randn(1, 6, 5, 7)
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
