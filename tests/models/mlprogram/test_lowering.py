"""Lowering: buffers are shared and freed only when it is safe, and unknown operations are refused."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.ops import KINDS

SHAPE = (1, 8, 6, 6)


def chain(length: int) -> Callable[..., Any]:
    def build(mb: Any, x: Any) -> Any:
        for i in range(length):
            x = mb.softmax(x=x, axis=-1, name=f"link_{i}")  # has no in-place form
        return x

    return build


def only(result: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = result.values()
    return array


def test_buffers_in_use_are_not_overwritten(save_program: Callable[..., Path]) -> None:
    """Each in-place form of a value that is read again, has a view, is an input, or is not read again."""

    def build(mb: Any, x: Any) -> Any:
        fresh = mb.exp(x=x)
        read_again = [mb.gelu(x=fresh), mb.relu(x=fresh), mb.add(x=fresh, y=fresh), mb.mul(x=fresh, y=2.0)]
        source = mb.exp(x=x)
        view = mb.reshape(x=source, shape=[1, 4, 2, 36])
        changed = mb.tanh(x=source)
        base = mb.exp(x=x)
        changed_view = mb.tanh(x=mb.reshape(x=base, shape=[1, 4, 2, 36]))
        after = mb.mul(x=base, y=3.0)
        of_input = mb.relu(x=x)
        dies = mb.sqrt(x=mb.square(x=mb.exp(x=x)))
        return [*read_again, mb.identity(x=view), changed, changed_view, after, of_input, dies, mb.identity(x=x)]

    executor = Executor(save_program(build, {"x": SHAPE}))
    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    found = list(executor.run({"x": x}).values())
    e = np.exp(x)
    assert len(found) == 11
    gelu = torch.nn.functional.gelu(torch.from_numpy(e)).numpy()
    expected = [
        gelu,
        e,
        e + e,
        e * 2,
        e.reshape(1, 4, 2, 36),
        np.tanh(e),
        np.tanh(e).reshape(1, 4, 2, 36),
        e * 3,
        np.maximum(x, 0),
        e,
        x,
    ]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_broadcast_operand_is_not_reused_for_a_larger_result(save_program: Callable[..., Path]) -> None:
    def build(mb: Any, x: Any) -> Any:
        small = mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True)
        return mb.add(x=small, y=mb.exp(x=x))

    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    found = only(Executor(save_program(build, {"x": SHAPE})).run({"x": x}))
    np.testing.assert_allclose(found, x.mean((2, 3), keepdims=True) + np.exp(x), rtol=1e-5)


def test_values_are_freed_after_their_last_use(
    save_program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def bind(p: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        inner = KINDS_SOFTMAX.bind(p)

        def step(x: torch.Tensor) -> torch.Tensor:
            nonlocal most
            result = inner(x)
            made.append(weakref.ref(result))
            most = max(most, sum(ref() is not None for ref in made))
            return result

        return step

    KINDS_SOFTMAX = KINDS["softmax"]
    monkeypatch.setitem(KINDS, "softmax", dataclasses.replace(KINDS_SOFTMAX, bind=bind))
    executor = Executor(save_program(chain(12), {"x": SHAPE}))
    executor.run({"x": np.zeros(SHAPE, np.float32)})
    assert len(made) == 12
    assert most == 2
    assert all(ref() is None for ref in made)
    assert executor.working_bytes == 2 * 8 * 6 * 6 * 4


def test_dead_operations_are_dropped(save_program: Callable[..., Path]) -> None:
    def build(mb: Any, x: Any) -> Any:
        mb.exp(x=x, name="dead")
        return mb.relu(x=x, name="alive")

    executor = Executor(save_program(build, {"x": SHAPE}), record_ranges=True)
    executor.run({"x": np.ones(SHAPE, np.float32)})
    assert "dead" in {o.name for o in executor.program.operations}
    assert set(executor.ranges) == {"x", "alive"}


def test_unknown_operation_is_listed_with_those_supported(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    def change(model: Any) -> None:
        next(o for o in block_of(model).operations if o.type == "gelu").type = "topk"

    with pytest.raises(PackageError, match=r"act\S*: .*'topk'.*add, .*transpose") as caught:
        Executor(edit(small_package, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("weight", r"first.*weight is missing"), ("pad_type", None), ("x", "x is missing")],
)
def test_missing_parameter_is_named_unless_it_has_a_default(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any], name: str, message: str | None
) -> None:
    def change(model: Any) -> None:
        conv = next(o for o in block_of(model).operations if o.type == "conv")
        del conv.inputs[name]

    damaged = edit(small_package, change)
    if message is None:
        with pytest.raises(PackageError, match=r"must be fp16\[1, 16, 6, 6\], got shape \[1, 16, 4, 4\]"):
            Executor(damaged).run({"x": np.zeros(SHAPE, np.float32)})
        return
    with pytest.raises(PackageError, match=message):
        Executor(damaged)
