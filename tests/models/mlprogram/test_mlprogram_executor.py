"""The executor: lifetimes, precision, ranges, and what it refuses."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm.models.errors import PackageError, UsageError
from fastvlm.models.mlprogram import read_package
from fastvlm.models.mlprogram.binding import Kind
from fastvlm.models.mlprogram.executor import Executor, _check_input, max_abs
from fastvlm.models.mlprogram.ops import KINDS

SHAPE = (1, 8, 6, 6)


@pytest.fixture
def image() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)}


def chain(length: int) -> Callable[..., Any]:
    def build(mb: Any, x: Any) -> Any:
        for i in range(length):
            x = mb.softmax(x=x, axis=-1, name=f"link_{i}")  # has no form that works in place
        return x

    return build


def only(result: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = result.values()
    return array


def test_runs_repeat_exactly_and_leave_the_input_alone(small_package: Path, image: dict[str, np.ndarray]) -> None:
    executor = Executor(small_package)
    kept = image["x"].copy()
    image["x"].flags.writeable = False
    first, second = executor.run(image), executor.run(image)
    np.testing.assert_array_equal(only(first), only(second))
    np.testing.assert_array_equal(image["x"], kept)
    assert only(first).flags.owndata and only(first).flags.c_contiguous and only(first).dtype == np.float32


def test_buffers_that_others_still_see_are_not_overwritten(save_program: Callable[..., Path]) -> None:
    """Each in-place form, on a value that is read again, that has a view, that is an input, and that dies."""

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


def test_broadcast_operand_is_not_the_place_for_a_larger_result(save_program: Callable[..., Path]) -> None:
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


def test_other_values_can_be_asked_for(small_package: Path, image: dict[str, np.ndarray]) -> None:
    program = read_package(small_package)
    (name,) = [o.outputs[0].name for o in program.operations if o.kind == "gelu"]
    found = Executor(program, outputs=[name]).run(image)
    assert list(found) == [name]
    assert found[name].dtype == np.float16 and found[name].shape == (1, 16, 6, 6)
    with pytest.raises(UsageError, match="nowhere"):
        Executor(program, outputs=["nowhere"])


def test_float16_rounds_each_result_as_numpy_does(save_program: Callable[..., Path]) -> None:
    build = lambda mb, x: mb.exp(x=x, name="out")  # noqa: E731
    path = save_program(build, {"x": (4, 50)}, half=True)
    x = np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32) * 3
    found = only(Executor(path, precision="float16").run({"x": x}))
    rounded = x.astype(np.float16).astype(np.float32)
    expected = np.exp(rounded).astype(np.float16).astype(np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, only(Executor(path).run({"x": x})))


def test_float16_leaves_float32_results_alone(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.exp(x=x), {"x": (4, 50)}, half=False)
    x = {"x": np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32)}
    np.testing.assert_array_equal(only(Executor(path, "float16").run(x)), only(Executor(path).run(x)))


def test_float16_cast_leaves_its_source_alone(save_program: Callable[..., Path]) -> None:
    def build(mb: Any, x: Any) -> Any:
        exact = mb.exp(x=x)
        rounded = mb.cast(x=mb.cast(x=exact, dtype="fp16"), dtype="fp32")
        return [rounded, mb.identity(x=exact, name="exact")]

    x = np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32)
    found = Executor(save_program(build, {"x": (4, 50)}), "float16").run({"x": x})
    exact = found.pop("exact")
    np.testing.assert_allclose(exact, np.exp(x), rtol=1e-6)
    np.testing.assert_array_equal(only(found), exact.astype(np.float16).astype(np.float32))
    assert not np.array_equal(only(found), exact)


def test_float16_sum_of_two_rounded_terms_is_rounded_once(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x, y: mb.add(x=x, y=y), {"x": (1000,), "y": (1000,)}, half=True)
    rng = np.random.default_rng(8)
    x, y = (rng.normal(size=1000).astype(np.float16) for _ in range(2))
    found = only(Executor(path, "float16").run({"x": x, "y": y}))
    np.testing.assert_array_equal(found.astype(np.float16), x + y)


def overflowing(mb: Any, x: Any) -> Any:
    large = mb.mul(x=x, y=np.float32(300.0), name="large")
    larger = mb.mul(x=large, y=np.float32(300.0), name="larger")
    return mb.mul(x=larger, y=np.float32(1e-3), name="out")


def test_first_overflow_is_named_with_its_true_size(save_program: Callable[..., Path]) -> None:
    executor = Executor(save_program(overflowing, {"x": (2, 3)}, half=True), "float16", record_ranges=True)
    assert np.isinf(only(executor.run({"x": np.ones((2, 3), np.float32)}))).all()
    assert executor.first_overflow is not None and executor.first_overflow.startswith("larger")
    assert executor.ranges[executor.first_overflow] == 90_000
    executor.run({"x": np.full((2, 3), 0.1, np.float32)})
    assert executor.first_overflow is None


def test_overflow_needs_no_ranges_and_float32_has_none(save_program: Callable[..., Path]) -> None:
    path = save_program(overflowing, {"x": (2, 3)}, half=True)
    ones = {"x": np.ones((2, 3), np.float32)}
    executor = Executor(path, "float16")
    executor.run(ones)
    assert executor.first_overflow is not None and executor.ranges == {}
    plain = Executor(path)
    np.testing.assert_allclose(only(plain.run(ones)), 90, rtol=1e-3)
    assert plain.first_overflow is None


def test_largest_float16_is_no_overflow(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.mul(x=x, y=np.float32(2.0)), {"x": (2,)}, half=True)
    executor = Executor(path, "float16")
    assert only(executor.run({"x": np.array([32752, -32752], np.float32)})).tolist() == [65504, -65504]
    assert executor.first_overflow is None


def test_ranges_are_maxima_over_all_runs(save_program: Callable[..., Path]) -> None:
    path = save_program(lambda mb, x: mb.exp(x=mb.sub(x=x, y=1.0, name="shifted"), name="out"), {"x": (1, 2, 2, 2)})
    executor = Executor(path, record_ranges=True)
    for top in (2.0, -5.0, 1.0):
        executor.run({"x": np.full((1, 2, 2, 2), top, np.float32)})
    assert executor.ranges == {"x": 5.0, "shifted": 6.0, "out": pytest.approx(np.e)}


def test_max_abs_sees_every_element_in_any_layout() -> None:
    base = torch.zeros(1, 3, 4, 5)
    base[0, 1, 2, 3] = -7
    for tensor in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.permute(0, 2, 3, 1),
        base[:, 1:, ::2],
    ):
        assert max_abs(tensor) == 7
    base[0, 0, 0, 0] = float("nan")
    assert np.isnan(max_abs(base))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"expected the inputs \['x'\], found \[\]"),
        ({"x": np.zeros(SHAPE), "y": np.zeros(1)}, r"found \['x', 'y'\]"),
        ({"x": np.zeros((1, 8, 6, 7))}, r"expected shape fp32\[1, 8, 6, 6\], found \[1, 8, 6, 7\]"),
        ({"x": np.zeros(SHAPE[1:])}, "expected shape"),
        ({"x": np.zeros(SHAPE, complex)}, "found complex128"),
        ({"x": np.full(SHAPE, "a")}, "numbers"),
        ({"x": np.full(SHAPE, np.nan)}, "finite"),
        ({"x": np.full(SHAPE, 1e39)}, "finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(small_package: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PackageError, match=message) as caught:
        Executor(small_package).run(inputs)
    assert "\n" not in str(caught.value)


def test_integer_image_is_converted(small_package: Path) -> None:
    executor = Executor(small_package)
    pixels = np.random.default_rng(0).integers(0, 256, size=SHAPE).astype(np.uint8)
    np.testing.assert_array_equal(
        only(executor.run({"x": pixels})), only(executor.run({"x": pixels.astype(np.float64)}))
    )


def test_integer_input_is_checked(save_program: Callable[..., Path]) -> None:
    build = lambda mb, x: mb.cast(x=x, dtype="fp32")  # noqa: E731
    executor = Executor(save_program(build, {"x": (2,)}, dtype="int32"))
    assert only(executor.run({"x": np.array([3, -4])})).tolist() == [3, -4]
    with pytest.raises(PackageError, match="range of int32, found 1099511627776"):
        executor.run({"x": np.array([1 << 40, 0])})
    with pytest.raises(PackageError, match="convert to int32, found float64"):
        executor.run({"x": np.array([1.5, 0.0])})


def test_input_is_copied(small_package: Path) -> None:
    (declared,) = read_package(small_package).inputs
    x = np.ones(SHAPE, np.float32)
    assert not np.shares_memory(_check_input(declared, x), x)


def test_unknown_operation_is_named_with_those_supported(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    def change(model: Any) -> None:
        next(o for o in block_of(model).operations if o.type == "gelu").type = "topk"

    with pytest.raises(PackageError, match=r"act\S*: .*'topk'.*add, .*transpose") as caught:
        Executor(edit(small_package, change))
    assert "\n" not in str(caught.value)


def test_result_of_another_shape_than_declared_is_refused(
    small_package: Path, edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    def change(model: Any) -> None:
        conv = next(o for o in block_of(model).operations if o.type == "conv")
        conv.outputs[0].type.tensorType.dimensions[2].constant.size = 5

    with pytest.raises(PackageError, match=r"expected fp16\[1, 16, 5, 6\], found shape \[1, 16, 6, 6\]"):
        Executor(edit(small_package, change))


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
        with pytest.raises(PackageError, match=r"expected fp16\[1, 16, 6, 6\], found shape \[1, 16, 4, 4\]"):
            Executor(damaged).run({"x": np.zeros(SHAPE, np.float32)})
        return
    with pytest.raises(PackageError, match=message):
        Executor(damaged)


def test_failure_inside_torch_names_the_operation(small_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("two lines\nof trouble")

    monkeypatch.setitem(KINDS, "gelu", Kind(("x",), lambda p: fail))
    with pytest.raises(PackageError, match=r"act\S* \(gelu\): two lines;") as caught:
        Executor(small_package).run({"x": np.zeros(SHAPE, np.float32)})
    assert "\n" not in str(caught.value)


def test_unknown_precision_is_refused(small_package: Path) -> None:
    with pytest.raises(UsageError, match="float32 or float16"):
        Executor(small_package, precision="bfloat16")


def test_activations_are_channels_last_and_results_are_not(
    small_package: Path, image: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels-last makes convolutions twice as fast; the caller never sees it."""
    seen: list[bool] = []

    def bind(p: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def step(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

        return step

    monkeypatch.setitem(KINDS, "gelu", Kind(("x",), bind))
    assert only(Executor(small_package).run(image)).flags.c_contiguous
    assert seen == [True]
