"""Each rule, with a program that breaks it and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.export import exporter
from fastvlm.export.exporter import export
from fastvlm.export.inspect_package import describe
from fastvlm.export.lint import COMPRESSED_WEIGHTS_KEY, RULES, lint
from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import Operation, Program, TensorType, Value


def tensor(name: str, *shape: int, dtype: str = "fp16") -> TensorType:
    return TensorType(name, dtype, shape)


def value(array: Any) -> Value:
    array = np.asarray(array)
    names = {"float16": "fp16", "float32": "fp32"}
    return Value(TensorType("", names.get(array.dtype.name, array.dtype.name), array.shape), array)


def operation(kind: str, output: TensorType, **inputs: Any) -> Operation:
    return Operation(kind, f"{kind}_0", {name: (given,) for name, given in inputs.items()}, {}, (output,))


def program(*operations: Operation, **changes: Any) -> Program:
    """A clean program, images -> cast -> `operations` -> cast, with `changes`."""
    images = tensor("images", 1, 16, 64, 64, dtype="fp32")
    cast = operation("cast", tensor("x", 1, 16, 64, 64), x="images")
    last = operation("cast", tensor("image_features", 1, 16, 64, 64, dtype="fp32"), x="x")
    clean = Program((images,), last.outputs, (cast, *operations, last), 8, "CoreML7", {}, Path("x.mlpackage"), {})
    return replace(clean, **changes)


def test_shapes_of_strangers_do_not_end_the_lint() -> None:
    none = operation("relu", tensor("y", 1, 0, 64, 8), x="x")
    flat = operation("conv", tensor("z", 7), x="x")
    without = replace(flat, outputs=())
    told = lint(program(none, flat, without, relu(1, 2, 8, 64, 64)))
    assert [(finding.rule, finding.count) for finding in told] == [("rank 5", 1)]


def constant(array: Any) -> Operation:
    held = value(array)
    output = TensorType("weight", held.type.dtype, held.type.shape)
    return Operation("const", "weight", {}, {"val": held}, (output,))


def relu(*shape: int, dtype: str = "fp16") -> Operation:
    return operation("relu", tensor("y", *shape, dtype=dtype), x="x")


def palette(entries: int) -> Operation:
    """Returns a palette in iOS 16's form."""
    held = {"lut": value(np.ones(entries, np.float16)), "shape": value(np.array([16, 16, 1, 1], np.uint32))}
    return Operation("constexpr_lut_to_dense", "w", {}, held, (tensor("w", 16, 16, 1, 1),))


def pair(*sizes: int) -> Value:
    return value(np.array(sizes, np.int32))


SUBNORMAL = np.full((8, 8), 1e-6, np.float16)


BROKEN = {
    "fixed shapes": program(relu(1, 16, -1, 64)),
    "batch of one": program(inputs=(tensor("images", 2, 16, 64, 64, dtype="fp32"),)),
    "float16": program(relu(1, 16, 64, 64, dtype="fp32")),
    "rank": program(relu(1, 2, 2, 2, 2, 32)),
    "extent": program(relu(1, 16, 1, 16385)),
    "kernel width": program(
        constant(np.ones((16, 1, 15, 15), np.float16)),
        operation("conv", tensor("y", 1, 16, 64, 64), x="x", weight="weight"),
    ),
    "operations": program(operation("cumsum", tensor("y", 1, 16, 64, 64), x="x")),
    "block scales": program(
        operation("constexpr_blockwise_shift_scale", tensor("w", 4, 64), scale=value(np.ones((4, 2), np.float16)))
    ),
    "compression": program(metadata={COMPRESSED_WEIGHTS_KEY: "3"}),
    "constants": program(constant(np.array([1, np.inf], np.float16))),
    "int8 products": program(
        operation("dequantize", tensor("a", 1, 16, 64, 64), input="q"),
        operation("mul", tensor("y", 1, 16, 64, 64), x="x", y="a"),
        operation("quantize", tensor("q", 1, 16, 64, 64, dtype="int8"), input="y"),
    ),
    "4-bit palettes": program(palette(16)),
    "iOS 18 palettes": program(
        operation("constexpr_lut_to_dense", tensor("w", 4, 64), lut=value(np.ones((1, 1, 256, 1), np.float16)))
    ),
    "palette strides": program(
        palette(256), operation("conv", tensor("y", 1, 16, 16, 64), x="x", weight="w", strides=pair(4, 4))
    ),
    "strides": program(operation("conv", tensor("y", 1, 16, 64, 64), x="x", strides=pair(5, 5))),
    "dilations": program(operation("conv", tensor("y", 1, 16, 64, 64), x="x", dilations=pair(8, 8))),
    "large softmax": program(
        operation("softmax", tensor("y", 1, 2, 1024, 1024), x="x", axis=value(np.int32(-2))),
    ),
    "border rows": program(outputs=(tensor("image_features", 1, 16, 7, dtype="fp32"),)),
    "unfused norm": program(operation("rsqrt", tensor("y", 1, 16, 64, 64), x="x")),
    "costly kinds": program(operation("squeeze", tensor("y", 16, 64, 64), x="x")),
    "turned weights": program(
        operation("softmax", tensor("w", 1, 16, 64, 64), x="x"),
        operation("matmul", tensor("y", 1, 16, 64, 64), x="x", y="w", transpose_y=value(np.array(True))),
    ),
    "transposes": program(
        operation("transpose", tensor("y", 1, 64, 16, 64), x="x"),
        operation("transpose", tensor("z", 1, 64, 64, 32), x="y"),
    ),
    "rank 5": program(relu(1, 2, 8, 64, 64)),
    "large pools": program(
        operation("avg_pool", tensor("y", 1, 16, 50, 50), x="x", kernel_sizes=value(np.array([15, 15], np.int32)))
    ),
    "short rows": program(relu(1, 16, 64, 8)),
    "odd channels": program(
        constant(np.ones((17, 16, 1, 1), np.float16)),
        operation("conv", tensor("y", 1, 17, 64, 64), x="x", weight="weight"),
    ),
    "large operands": program(relu(1, 16, 512, 512)),
    "heavy weights": program(
        replace(constant(np.ones(9, np.float16)), attributes={"val": replace(value(np.ones(9, np.float16)), offset=64)})
    ),
    "subnormal constants": program(constant(SUBNORMAL)),
}


def test_every_rule_has_a_program_that_breaks_it() -> None:
    assert BROKEN.keys() == {rule.name for rule in RULES}


def test_clean_program_has_no_finding() -> None:
    assert lint(program(relu(1, 16, 64, 64), constant(np.ones((8, 8), np.float16)))) == []


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_rule_is_broken_alone(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rule == "heavy weights":
        monkeypatch.setattr("fastvlm.export.lint.MAX_WEIGHT_BYTES", 10)
    implied = {"large softmax": ["large operands"]}.get(rule, [])
    finding, *others = lint(BROKEN[rule])
    assert [other.rule for other in others] == implied
    assert finding.rule == rule
    assert finding.count == 1
    assert finding.example
    assert finding.reason
    assert finding.advice


@pytest.mark.parametrize(
    "changes",
    [{"transpose_y": value(np.array(False))}, {"y": "x"}, {"x": value(np.ones((1, 16, 64, 64), np.float16))}],
    ids=["as they are", "no softmax", "a constant times them"],
)
def test_matmul_is_clean_without_turned_weights(changes: dict[str, Any]) -> None:
    inputs = {"x": "x", "y": "w", "transpose_y": value(np.array(True))} | changes
    softmax = operation("softmax", tensor("w", 1, 16, 64, 64), x="x")
    assert lint(program(softmax, operation("matmul", tensor("y", 1, 16, 64, 64), **inputs))) == []


@pytest.mark.parametrize(
    ("kind", "strides", "slow"),
    [("conv", (12, 12), False), ("conv", (2, 3), False), ("conv", (2, 4), False), ("conv", (3, 4), True),
     ("conv", (7, 7), True), ("max_pool", (4, 4), False), ("max_pool", (3, 3), True), ("relu", (7, 7), False)],
)  # fmt: skip
def test_strides_are_products_of_2_and_3(kind: str, strides: tuple[int, int], slow: bool) -> None:
    found = lint(program(operation(kind, tensor("y", 1, 16, 64, 64), x="x", strides=pair(*strides))))
    assert [finding.rule for finding in found] == (["strides"] if slow else [])


def test_softmax_over_channels_may_be_large() -> None:
    channels = operation("softmax", tensor("y", 1, 2, 1024, 1024), x="x", axis=value(np.int32(1)))
    assert [finding.rule for finding in lint(program(channels))] == ["large operands"]


def test_single_number_in_the_last_axis_is_a_short_row() -> None:
    (finding,) = lint(program(relu(1, 64, 64, 1)))
    assert finding.rule == "short rows"
    assert finding.source.endswith("neural_engine_rules.md")


def test_values_past_float16_in_a_float32_constant_are_an_error() -> None:
    (finding,) = lint(program(constant(np.array([1, 7e4], np.float32))))
    assert (finding.severity, finding.rule) == ("error", "constants")
    assert "70000" in finding.example


def test_flops_are_those_of_the_layers() -> None:
    weight = constant(np.ones((32, 16, 3, 3), np.float16))
    conv = operation("conv", tensor("y", 1, 32, 64, 64), x="x", weight="weight")
    left = operation("relu", tensor("q", 1, 4, 32, 100), x="x")
    matmul = operation(
        "matmul",
        tensor("z", 1, 4, 100, 100),
        x="q",
        y="q",
        transpose_x=value(np.array(True)),
        transpose_y=value(np.array(False)),
    )
    report = describe(program(weight, conv, left, matmul))
    assert report.flops == 2 * 32 * 64 * 64 * 16 * 9 + 2 * 4 * 100 * 100 * 32


@pytest.mark.slow
def test_export_refuses_a_broken_rule_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm.export.lint.MAX_KERNEL", 5)  # the encoder's kernels are 7 wide
    with pytest.raises(PackageError, match=r"would not run on the Neural Engine: kernel width: .*allow_lint=True"):
        export("random:tiny", out=tmp_path / "model", quant="fp16")
    assert list(tmp_path.iterdir()) == []
    assert exporter.export("random:tiny", out=tmp_path / "model", quant="fp16", allow_lint=True).folder.is_dir()
