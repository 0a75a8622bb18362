"""Lowering: buffers freed only when it is safe, chains fused, unknown operations and absurd memory refused."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import Constants, Operation, Program, TensorType, Value, lowering, read_package
from fastvlm.models.mlprogram import executor as executor_module
from fastvlm.models.mlprogram.binding import Parameters
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.lowering import ATTENTION, FEED_FORWARD, FEED_FORWARD_ADD, FUSED_KINDS, MAX_BYTES, lower
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


def test_all_unsupported_kinds_are_listed(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    def change(model: Any) -> None:
        for operation in block_of(model).operations:
            operation.type = {"gelu": "random_normal", "conv": "affine"}.get(operation.type, operation.type)

    kinds = r"3 of 5 operations are of kinds that cannot be run: affine \(2\), random_normal \(1\)\. Run"
    with pytest.raises(PackageError, match=kinds) as caught:
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


def test_absurd_paddings_are_refused(save_program: Callable[..., Path], edit: Edit, block_of: Any) -> None:
    def build(mb: Any, x: Any) -> Any:
        return mb.conv(x=x, weight=np.ones((2, 2, 3, 3)), pad_type="custom", pad=[1, 1, 1, 1])

    package = save_program(build, {"x": (1, 2, 6, 6)})
    Executor(package)

    def change(model: Any) -> None:
        constant(block_of(model), "pad").immediateValue.tensor.ints.values[0] = 2**30

    with pytest.raises(PackageError, match=r"conv.*padded input must have at most"):
        Executor(edit(package, change))


@pytest.mark.slow
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

    with pytest.raises(PackageError, match=rf"values must take at most {MAX_BYTES} bytes|got shape|padded input"):
        Executor(edit(small_package, change))


def test_computed_sizes_are_checked_before_memory_is_allocated(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.fill(shape=x, value=1.0), {"x": (2,)}, dtype="int32")
    executor = Executor(path)
    (found,) = executor.run({"x": np.array([2, 3], np.int32)}).values()
    np.testing.assert_array_equal(found, np.ones((2, 3)))
    with pytest.raises(
        PackageError, match=rf"result must take at most {MAX_BYTES} bytes, got shape \[1048576, 1048576\]"
    ):
        executor.run({"x": np.array([2**20, 2**20], np.int32)})


def test_open_values_alive_at_once_are_bounded(
    save_program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(mb: Any, x: Any) -> Any:
        parts = [mb.fill(shape=x, value=float(i)) for i in range(4)]
        return [mb.identity(x=part) for part in parts]

    executor = Executor(save_program(build, {"x": (1,)}, dtype="int32"))
    monkeypatch.setattr(executor_module, "MAX_BYTES", 10_000)
    executor.run({"x": np.array([100], np.int32)})
    with pytest.raises(PackageError, match="values must take at most 10000 bytes"):
        executor.run({"x": np.array([1000], np.int32)})


def test_too_many_operations_are_refused(small_package: Path, edit: Edit, block_of: Any) -> None:
    def change(model: Any) -> None:
        operations = block_of(model).operations
        gelu = operation(block_of(model), "gelu")
        for _ in range(20_000):
            operations.add().CopyFrom(gelu)

    with pytest.raises(PackageError, match="must have at most 20000 operations"):
        read_package(edit(small_package, change))


DRAW = np.random.default_rng(0)
WIDE, NARROW, KERNEL = (DRAW.normal(size=shape) for shape in ((48, 16, 1, 1), (16, 48, 1, 1), (48, 16, 3, 3)))
CHAINS_SHAPE = (1, 16, 5, 7)


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

    return save_program(build, {"x": CHAINS_SHAPE, "tokens": (1, 48, 2, 5)})


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

    return save_program(build, {"x": CHAINS_SHAPE, "tokens": (1, 48, 2, 5)})


def inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        "x": draw.normal(size=CHAINS_SHAPE).astype(np.float32),
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
    monkeypatch.setattr(lowering, "ROWS_AT_ONCE", rows)  # of 35 positions
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
    monkeypatch.setattr(lowering, "ROWS_AT_ONCE", rows)
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
