"""Lowering: buffers are freed only when it is safe, and unknown operations and absurd memory are refused."""

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
from fastvlm.models.mlprogram import read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.lowering import MAX_BYTES
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


Edit = Callable[[Path, Callable[[Any], None]], Path]


def operation(block: Any, kind: str) -> Any:
    return next(item for item in block.operations if item.type == kind)


def constant(block: Any, name: str) -> Any:
    """Returns the value of the first convolution's constant `name`."""
    wanted = operation(block, "conv").inputs[name].arguments[0].name
    made = next(item for item in block.operations if item.outputs and item.outputs[0].name == wanted)
    return made.attributes["val"]


def test_small_program_is_accepted(small_package: Path) -> None:
    Executor(small_package).run({"x": np.zeros((1, 8, 6, 6), np.float32)})


def test_paddings_beyond_the_kernel_are_refused(save_program: Callable[..., Path], edit: Edit, block_of: Any) -> None:
    def build(mb: Any, x: Any) -> Any:
        return mb.conv(x=x, weight=np.ones((2, 2, 3, 3)), pad_type="custom", pad=[1, 1, 1, 1])

    package = save_program(build, {"x": (1, 2, 6, 6)})
    Executor(package)

    def change(model: Any) -> None:
        constant(block_of(model), "pad").immediateValue.tensor.ints.values[0] = 2**30

    with pytest.raises(PackageError, match=r"conv.*paddings must be at most the kernel's spans \[3, 3\]"):
        Executor(edit(package, change))


@pytest.mark.parametrize("kind", ["add", "matmul", "concat"])
def test_results_larger_than_the_operands_are_refused(
    save_program: Callable[..., Path], edit: Edit, block_of: Any, kind: str
) -> None:
    def build(mb: Any, x: Any, y: Any) -> Any:
        made = {"add": mb.add, "matmul": mb.matmul}.get(kind)
        return made(x=x, y=y) if made else mb.concat(values=[x, y], axis=0)

    package = save_program(build, {"x": (4, 4), "y": (4, 4)})
    Executor(package).run({name: np.ones((4, 4), np.float32) for name in "xy"})

    def change(model: Any) -> None:
        operation(block_of(model), kind).outputs[0].type.tensorType.dimensions[0].constant.size = 5

    with pytest.raises(PackageError, match=r"must be fp32\[5, 4\], got shape \[[48], 4\]"):
        Executor(edit(package, change))


def test_values_of_absurd_size_are_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        operation(block_of(model), "gelu").outputs[0].type.tensorType.dimensions[0].constant.size = 2**34

    with pytest.raises(PackageError, match=rf"values must take at most {MAX_BYTES} bytes|got shape"):
        Executor(edit(small_package, change))


def test_open_shape_with_fixed_inputs_is_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        dimension = operation(block_of(model), "gelu").outputs[0].type.tensorType.dimensions[0]
        dimension.ClearField("constant")
        dimension.unknown.variadic = False

    with pytest.raises(PackageError, match="must have a fixed shape"):
        Executor(edit(small_package, change))


def test_too_many_operations_are_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        operations = block_of(model).operations
        gelu = operation(block_of(model), "gelu")
        for _ in range(20_000):
            operations.add().CopyFrom(gelu)

    with pytest.raises(PackageError, match="must have at most 20000 operations"):
        read_package(edit(small_package, change))
