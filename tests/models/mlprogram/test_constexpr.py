"""Compressed constants: each kind compared with its documented formula and with coremltools' decompression."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import (
    Constants,
    Operation,
    Program,
    TensorType,
    Value,
    constexpr_census,
    read_package,
    scheme,
    stored_bytes,
)
from fastvlm.models.mlprogram.executor import Executor

RNG = np.random.default_rng(11)


def only_constexpr(program: Program) -> np.ndarray:
    (operation,) = [o for o in program.operations if o.kind.startswith("constexpr_")]
    return Constants(program).decode(operation)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs by the documented rule, with one big Python integer."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values.reshape(-1)))
    return np.frombuffer(number.to_bytes((values.size * bits + 7) // 8, "little"), dtype=np.uint8)


def adding(constant: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda mb, x: mb.add(x=x, y=constant(mb), name="out")


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "vector"), [(0, True), (1, True), (-1, True), (0, False)])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_affine_dequantize_follows_its_formula(
    save_program: Callable[..., Path], axis: int, vector: bool, dtype: type
) -> None:
    data: np.ndarray = RNG.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, size=(4, 3, 2, 5)).astype(dtype)
    shape = (data.shape[axis],) if vector else ()
    scale = np.asarray(RNG.random(shape) + 0.1, dtype=np.float32)
    zero: np.ndarray = np.asarray(RNG.integers(0, 9, size=shape), dtype=dtype)
    path = save_program(
        adding(lambda mb: mb.constexpr_affine_dequantize(quantized_data=data, scale=scale, zero_point=zero, axis=axis)),
        {"x": data.shape},
    )
    columns = [-1 if vector and i == axis % 4 else 1 for i in range(4)]
    expected = scale.reshape(columns) * (data.astype(np.float64) - zero.reshape(columns).astype(np.float64))
    np.testing.assert_allclose(only_constexpr(read_package(path)), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_packed_palette_follows_its_formula(save_program: Callable[..., Path], bits: int) -> None:
    shape = (3, 5, 1, 7)  # 105 elements end inside a byte for every width but 8
    indices = RNG.integers(0, 1 << bits, size=shape)
    lut = RNG.normal(size=1 << bits).astype(np.float16)
    make = adding(
        lambda mb: mb.cast(
            x=mb.constexpr_lut_to_dense(indices=packed(indices, bits), lut=lut, shape=np.array(shape, np.uint32)),
            dtype="fp32",
        )
    )
    program = read_package(save_program(make, {"x": shape}, target="iOS16"))
    np.testing.assert_array_equal(only_constexpr(program), lut[indices])
    assert f"{bits}-bit palette" in [scheme(o) for o in program.operations]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_grouped_palette_follows_its_formula(save_program: Callable[..., Path], ct: ModuleType, bits: int) -> None:
    from coremltools.converters.mil.mil import types

    indices = RNG.integers(0, 1 << bits, size=(6, 4))
    lut = RNG.normal(size=(3, 2, 1 << bits, 1)).astype(np.float32)
    typed = indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))
    path = save_program(
        adding(lambda mb: mb.constexpr_lut_to_dense(indices=typed, lut=lut)), {"x": (6, 4)}, target="iOS18"
    )
    expected = [[lut[i // 2, j // 2, indices[i, j], 0] for j in range(4)] for i in range(6)]
    np.testing.assert_array_equal(only_constexpr(read_package(path)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vector_palette_follows_its_formula(save_program: Callable[..., Path], ct: ModuleType, axis: int) -> None:
    from coremltools.converters.mil.mil import types

    indices = RNG.integers(0, 4, size=(2, 6, 5))
    lut = RNG.normal(size=(1, 1, 1, 4, 3)).astype(np.float32)
    typed = indices.astype(types.nptype_from_builtin(types.string_to_builtin("uint2")))
    shape = tuple(size * (3 if i == axis % 3 else 1) for i, size in enumerate(indices.shape))
    make = adding(lambda mb: mb.constexpr_lut_to_dense(indices=typed, lut=lut, vector_axis=axis))
    found = only_constexpr(read_package(save_program(make, {"x": shape}, target="iOS18")))
    for place in np.ndindex(shape):
        source = tuple(p // 3 if i == axis % 3 else p for i, p in enumerate(place))
        assert found[place] == lut[0, 0, 0, indices[source], place[axis] % 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("offset", [False, True])
def test_blockwise_shift_scale_follows_its_formula(
    save_program: Callable[..., Path], ct: ModuleType, name: str, offset: bool
) -> None:
    from coremltools.converters.mil.mil import types

    dtype = types.nptype_from_builtin(types.string_to_builtin(name))
    low = (-8 if "4" in name else -128) if name.startswith("i") else 0
    span = 16 if "4" in name else 256
    data = RNG.integers(low, low + span, size=(4, 6, 3))
    scale = (RNG.random((2, 3, 1)) + 0.1).astype(np.float32)
    shift = RNG.integers(low, low + span, size=scale.shape)
    extra = {"offset": shift.astype(dtype)} if offset else {}
    make = adding(lambda mb: mb.constexpr_blockwise_shift_scale(data=data.astype(dtype), scale=scale, **extra))
    found = only_constexpr(read_package(save_program(make, {"x": data.shape}, target="iOS18")))
    for i, j, k in np.ndindex(data.shape):
        expected = scale[i // 2, j // 2, 0] * (data[i, j, k] - (shift[i // 2, j // 2, 0] if offset else 0))
        assert found[i, j, k] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_sparse_to_dense_follows_its_formula(save_program: Callable[..., Path], ct: ModuleType, target: str) -> None:
    from coremltools.converters.mil.mil import types

    mask = RNG.integers(0, 2, size=(3, 7))
    values = RNG.normal(size=int(mask.sum())).astype(np.float32)
    if target == "iOS16":
        extra = {"mask": packed(mask, 1), "shape": np.array(mask.shape, np.uint32)}
    else:
        extra = {"mask": mask.astype(types.nptype_from_builtin(types.string_to_builtin("uint1")))}
    make = adding(lambda mb: mb.constexpr_sparse_to_dense(nonzero_data=values, **extra))
    expected = np.zeros(mask.shape, np.float32)
    expected[mask == 1] = values
    found = only_constexpr(read_package(save_program(make, {"x": mask.shape}, target=target)))
    np.testing.assert_array_equal(found, expected)


def test_cast_widens_float16(save_program: Callable[..., Path]) -> None:
    values = RNG.normal(size=(4, 3)).astype(np.float16)
    make = adding(lambda mb: mb.constexpr_cast(source_val=values, output_dtype="fp32"))
    found = only_constexpr(read_package(save_program(make, {"x": (4, 3)})))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))


RECIPES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "int8": ("iOS17", "linear", {"mode": "linear_symmetric"}, "int8 affine"),
    "uint8": ("iOS17", "linear", {"mode": "linear", "dtype": "uint8"}, "uint8 affine"),
    "int8_ios18": ("iOS18", "linear", {"mode": "linear_symmetric"}, "int8 blockwise"),
    "int4_blocks": (
        "iOS18",
        "linear",
        {"mode": "linear_symmetric", "dtype": "int4", "granularity": "per_block", "block_size": 4},
        "int4 blockwise",
    ),
    "pal4": ("iOS17", "palette", {"nbits": 4}, "4-bit palette"),
    "pal6": ("iOS17", "palette", {"nbits": 6}, "6-bit palette"),
    "pal4_groups": (
        "iOS18",
        "palette",
        {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 4},
        "4-bit palette",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_model_decodes_as_coremltools_does(
    save_program: Callable[..., Path], ct: ModuleType, tmp_path: Path, recipe: str
) -> None:
    target, family, options, expected_scheme = RECIPES[recipe]
    if family == "palette":
        pytest.importorskip("sklearn")
    optimize = ct.optimize.coreml
    plain = tmp_path / "plain.mlpackage"

    def compress(model: Any) -> Any:
        config = optimize.OpLinearQuantizerConfig if family == "linear" else optimize.OpPalettizerConfig
        function = optimize.linear_quantize_weights if family == "linear" else optimize.palettize_weights
        compressed = function(model, optimize.OptimizationConfig(global_config=config(weight_threshold=1, **options)))
        optimize.decompress_weights(compressed).save(str(plain))
        return compressed

    rng = np.random.default_rng(5)

    def build(mb: Any, x: Any) -> Any:
        h = mb.conv(x=x, weight=rng.normal(size=(16, 8, 3, 3)), bias=rng.normal(size=16), pad_type="same")
        return mb.conv(x=mb.relu(x=h), weight=rng.normal(size=(8, 16, 1, 1)), name="out")

    path = save_program(build, {"x": (1, 8, 5, 5)}, target=target, half=True, compress=compress)
    program, decompressed = read_package(path), read_package(plain)
    assert sum(constexpr_census(program).values()) == 2
    assert sum(constexpr_census(decompressed).values()) == 0
    assert stored_bytes(program)[expected_scheme] > 0

    image = {"x": rng.normal(size=(1, 8, 5, 5)).astype(np.float32)}
    found, expected = Executor(program).run(image), Executor(decompressed).run(image)
    (name,) = expected
    np.testing.assert_array_equal(found[name], expected[name])
    ours, theirs = (_conv_weights(p) for p in (program, decompressed))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def _conv_weights(program: Program) -> list[np.ndarray]:
    return [Constants(program).array(o.inputs["weight"][0]) for o in program.operations if o.kind == "conv"]


@pytest.mark.parametrize(("length", "decodes"), [(4, True), (5, False)])
def test_chain_of_constants_has_a_limit(length: int, decodes: bool) -> None:
    value = Value(TensorType("c", "fp16", (2,)), np.array([1, 2], np.float16))
    operations = [Operation("const", "c0", {}, {"val": value}, (TensorType("c0", "fp16", (2,)),))]
    for i in range(length):
        output = TensorType(f"c{i + 1}", "fp32", (2,))
        operations.append(Operation("constexpr_cast", output.name, {"source_val": (f"c{i}",)}, {}, (output,)))
    program = Program((), (), tuple(operations), 9, "CoreML8", {}, Path("made up"), {})
    if decodes:
        assert Constants(program).array(f"c{length}").tolist() == [1, 2]
        return
    with pytest.raises(PackageError, match="at most 4 constants in a chain"):
        Constants(program).array(f"c{length}")


def test_contradicting_parameters_are_one_error(
    save_program: Callable[..., Path], edit: Callable[..., Path], block_of: Callable[[Any], Any]
) -> None:
    data, scale = np.ones((4, 3), np.int8), np.ones(4, np.float32)
    make = adding(
        lambda mb: mb.constexpr_affine_dequantize(quantized_data=data, scale=scale, zero_point=np.int8(0), axis=0)
    )

    def change(model: Any) -> None:
        (operation,) = [o for o in block_of(model).operations if o.type.startswith("constexpr")]
        operation.attributes["axis"].immediateValue.tensor.ints.values[0] = 1

    damaged = edit(save_program(make, {"x": (4, 3)}), change)
    with pytest.raises(PackageError, match="vector along axis 1 of \\(4, 3\\), got shape \\(4,\\)"):
        only_constexpr(read_package(damaged))


def only_dense(program: Program) -> np.ndarray:
    (operation,) = [o for o in program.operations if o.kind == "constexpr_sparse_to_dense"]
    return Constants(program).decode(operation)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "uint4", "int8"])
@pytest.mark.parametrize("offset", [False, True])
def test_sparse_and_quantized_constant_follows_its_formula(
    save_program: Callable[..., Path], ct: ModuleType, name: str, offset: bool
) -> None:
    from coremltools.converters.mil.mil import types

    dtype = types.nptype_from_builtin(types.string_to_builtin(name))
    bit = types.nptype_from_builtin(types.string_to_builtin("uint1"))
    mask = RNG.integers(0, 2, size=(4, 6))
    data = RNG.integers(0, 8, size=(4, 6))
    scale = (RNG.random((2, 3)) + 0.1).astype(np.float32)
    shift = RNG.integers(0, 8, size=(2, 3))

    def build(mb: Any) -> Any:
        given = {"offset": shift.astype(dtype)} if offset else {}
        kept, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask.astype(bit), nonzero_data=data[mask != 0].astype(dtype), scale=scale, **given
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    found = only_dense(read_package(save_program(adding(build), {"x": (4, 6)}, target="iOS18")))
    wide = [np.kron(part, np.ones((2, 2))) for part in (scale.astype(np.float64), shift)]
    expected = np.where(mask, wide[0] * (data - (wide[1] if offset else 0)), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("vector", [1, 2])
def test_sparse_palette_follows_its_formula(save_program: Callable[..., Path], ct: ModuleType, vector: int) -> None:
    from coremltools.converters.mil.mil import types

    bit, two = (types.nptype_from_builtin(types.string_to_builtin(name)) for name in ("uint1", "uint2"))
    mask, indices = RNG.integers(0, 2, size=(4, 6)), RNG.integers(0, 4, size=(4, 6))
    lut = RNG.normal(size=(1, 1, 4, vector)).astype(np.float32)

    def build(mb: Any) -> Any:
        kept, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask.astype(bit), indices_nonzero_data=indices[mask != 0].astype(two), lut=lut, vector_axis=0
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    shape = (4 * vector, 6)
    found = only_dense(read_package(save_program(adding(build), {"x": shape}, target="iOS18")))
    for row, column in np.ndindex(shape):
        place = (row // vector, column)
        assert found[row, column] == (lut[0, 0, indices[place], row % vector] if mask[place] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme_name", ["quantized", "palette"])
def test_jointly_compressed_weights_are_coremltools_own(
    save_program: Callable[..., Path], ct: ModuleType, scheme_name: str
) -> None:
    weight = RNG.normal(size=(32, 64, 1, 1)).astype(np.float32)
    c = ct.optimize.coreml

    def compress(model: Any) -> Any:
        prune = c.OptimizationConfig(global_config=c.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=1))
        pruned = c.prune_weights(model, prune)
        if scheme_name == "quantized":
            linear = c.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=1)
            return c.linear_quantize_weights(pruned, c.OptimizationConfig(global_config=linear), joint_compression=True)
        uniform = c.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=1)
        return c.palettize_weights(pruned, c.OptimizationConfig(global_config=uniform), joint_compression=True)

    path = save_program(
        lambda mb, x: mb.conv(x=x, weight=weight), {"x": (1, 64, 2, 2)}, target="iOS18", half=True, compress=compress
    )
    found = only_dense(read_package(path))
    restored = c.get_weights_metadata(c.decompress_weights(ct.models.MLModel(str(path), skip_model_load=True)), 1)
    (expected,) = [w.val for w in restored.values() if w.val.shape == weight.shape]
    np.testing.assert_array_equal(found, expected)
