"""The operations of FastViTHD in one saved package, compared with numpy in float64, and damaged parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError
from fastvlm.models.mlprogram import model_class, read_package
from fastvlm.models.mlprogram.executor import Executor
from fastvlm.models.mlprogram.ops import KINDS

INPUTS = {
    "x": (1, 8, 6, 10),
    "y": (1, 8, 6, 10),
    "p": (2, 3, 4, 6),
    "q": (2, 3, 4, 6),
    "t": (1, 4, 9),
    "v": (1, 2, 4, 4, 4),
}
RNG = np.random.default_rng(7)
WEIGHT = RNG.normal(size=(12, 8, 3, 3)).astype(np.float32)
GROUPED = RNG.normal(size=(16, 2, 3, 2)).astype(np.float32)
DEPTHWISE = RNG.normal(size=(8, 1, 7, 7)).astype(np.float32)
WEIGHT_1D = RNG.normal(size=(6, 4, 3)).astype(np.float32)
WEIGHT_3D = RNG.normal(size=(3, 2, 2, 2, 2)).astype(np.float32)
BIAS = RNG.normal(size=12).astype(np.float32)
MATRIX = RNG.normal(size=(5, 6)).astype(np.float32)
VECTOR = RNG.normal(size=8).astype(np.float32)
POSITIVE = (RNG.random(8) + 0.5).astype(np.float32)
SCALES = np.linspace(0.01, 0.05, 8).astype(np.float32)
ZEROS = np.arange(-4, 4).astype(np.int8)


def windows(x: np.ndarray, kernel: tuple, strides: tuple, dilations: tuple) -> np.ndarray:
    """(B, C, *grid) -> (B, C, *grid_out, *kernel)."""
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, x.ndim))
    sliding: Any = np.lib.stride_tricks.sliding_window_view  # its stub forgets several axes
    view = sliding(x, spans, axes)
    steps = [slice(None)] * 2 + [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    return view[tuple(steps)]


def conv(
    x: np.ndarray, w: np.ndarray, pads: list, b: Any = 0, strides: Any = None, dilations: Any = None, groups: int = 1
) -> np.ndarray:
    axes = w.ndim - 2
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    view = windows(x, w.shape[2:], strides or (1,) * axes, dilations or (1,) * axes)
    results = []
    for part, kernel in zip(np.split(view, groups, 1), np.split(w, groups, 0), strict=True):
        contracted = [1, *range(2 + axes, 2 + 2 * axes)]
        results.append(np.moveaxis(np.tensordot(part, kernel, (contracted, list(range(1, w.ndim)))), -1, 1))
    return np.concatenate(results, 1) + np.reshape(b, (1, -1) + (1,) * axes)


def pool(x: np.ndarray, kernel: tuple, strides: tuple, pads: list, reduce: Callable, fill: float) -> np.ndarray:
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads], constant_values=fill)
    return reduce(windows(padded, kernel, strides, (1,) * len(kernel)), tuple(range(-len(kernel), 0)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def layer_norm(x: np.ndarray, axes: tuple, epsilon: float, gamma: Any = 1, beta: Any = 0) -> np.ndarray:
    x = x.astype(np.float64)
    z = x - x.mean(axes, keepdims=True)
    return z / np.sqrt((z * z).mean(axes, keepdims=True) + epsilon) * gamma + beta


def column(vector: np.ndarray) -> np.ndarray:
    return vector.reshape(1, -1, 1, 1)


def gelu_exact(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


NAN_MEAN = np.nanmean
MEAN = np.mean
Case = tuple[Callable[..., Any], Callable[..., np.ndarray]]
# name: (builder, expected values). A name is the kind, with a remark after "__".
CASES: dict[str, Case] = {
    "conv": (lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT), lambda x, **_: conv(x, WEIGHT, [(0, 0)] * 2)),
    "conv__bias_strides_custom": (
        lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT, bias=BIAS, strides=[2, 1], pad_type="custom", pad=[1, 1, 0, 0]),
        lambda x, **_: conv(x, WEIGHT, [(1, 1), (0, 0)], BIAS, (2, 1)),
    ),
    "conv__uneven_custom": (
        lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT, pad_type="custom", pad=[0, 2, 3, 1]),
        lambda x, **_: conv(x, WEIGHT, [(0, 2), (3, 1)]),
    ),
    "conv__same": (
        lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT, pad_type="same", strides=[2, 2]),
        lambda x, **_: conv(x, WEIGHT, [(0, 1), (0, 1)], strides=(2, 2)),
    ),
    "conv__same_lower": (
        lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT, pad_type="same_lower", strides=[2, 2]),
        lambda x, **_: conv(x, WEIGHT, [(1, 0), (1, 0)], strides=(2, 2)),
    ),
    "conv__same_dilated": (
        lambda mb, x, **_: mb.conv(x=x, weight=WEIGHT, pad_type="same", dilations=[2, 1]),
        lambda x, **_: conv(x, WEIGHT, [(2, 2), (1, 1)], dilations=(2, 1)),
    ),
    "conv__groups_dilations": (
        lambda mb, x, **_: mb.conv(x=x, weight=GROUPED, groups=4, dilations=[2, 3]),
        lambda x, **_: conv(x, GROUPED, [(0, 0)] * 2, dilations=(2, 3), groups=4),
    ),
    "conv__depthwise": (
        lambda mb, x, **_: mb.conv(x=x, weight=DEPTHWISE, groups=8, pad_type="custom", pad=[3, 3, 3, 3]),
        lambda x, **_: conv(x, DEPTHWISE, [(3, 3)] * 2, groups=8),
    ),
    "conv__1d": (lambda mb, t, **_: mb.conv(x=t, weight=WEIGHT_1D), lambda t, **_: conv(t, WEIGHT_1D, [(0, 0)])),
    "conv__3d": (lambda mb, v, **_: mb.conv(x=v, weight=WEIGHT_3D), lambda v, **_: conv(v, WEIGHT_3D, [(0, 0)] * 3)),
    "avg_pool": (
        lambda mb, x, **_: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="valid"),
        lambda x, **_: pool(x, (3, 2), (2, 2), [(0, 0)] * 2, MEAN, 0),
    ),
    "avg_pool__padded": (
        lambda mb, x, **_: mb.avg_pool(x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1]),
        lambda x, **_: pool(x, (3, 3), (1, 1), [(1, 1)] * 2, MEAN, 0),
    ),
    "avg_pool__excluding": (
        lambda mb, x, **_: mb.avg_pool(
            x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
        ),
        lambda x, **_: pool(x, (3, 3), (1, 1), [(1, 1)] * 2, NAN_MEAN, np.nan),
    ),
    "avg_pool__uneven_excluding": (
        lambda mb, x, **_: mb.avg_pool(
            x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[0, 1, 2, 0], exclude_padding_from_average=True
        ),
        lambda x, **_: pool(x, (3, 3), (1, 1), [(0, 1), (2, 0)], NAN_MEAN, np.nan),
    ),
    "max_pool": (
        lambda mb, x, **_: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="same"),
        lambda x, **_: pool(x, (3, 3), (2, 2), [(0, 1), (0, 1)], np.max, -np.inf),
    ),
    "batch_norm": (
        lambda mb, x, **_: mb.batch_norm(
            x=x, mean=VECTOR, variance=POSITIVE, gamma=POSITIVE, beta=VECTOR, epsilon=1e-3
        ),
        lambda x, **_: (x - column(VECTOR)) / np.sqrt(column(POSITIVE) + 1e-3) * column(POSITIVE) + column(VECTOR),
    ),
    "gelu": (lambda mb, x, **_: mb.gelu(x=x), lambda x, **_: gelu_exact(x)),
    "gelu__tanh": (lambda mb, x, **_: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x, **_: gelu_tanh(x)),
    "gelu__sigmoid": (
        lambda mb, x, **_: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x, **_: x * sigmoid(1.702 * x),
    ),
    "relu": (lambda mb, x, **_: mb.relu(x=x), lambda x, **_: np.maximum(x, 0)),
    "sigmoid": (lambda mb, x, **_: mb.sigmoid(x=x), lambda x, **_: sigmoid(x)),
    "silu": (lambda mb, x, **_: mb.silu(x=x), lambda x, **_: x * sigmoid(x)),
    "tanh": (lambda mb, x, **_: mb.tanh(x=x), lambda x, **_: np.tanh(x)),
    "exp": (lambda mb, x, **_: mb.exp(x=x), lambda x, **_: np.exp(x)),
    "square": (lambda mb, x, **_: mb.square(x=x), lambda x, **_: x**2),
    "sqrt": (lambda mb, x, **_: mb.sqrt(x=mb.square(x=x)), lambda x, **_: np.abs(x)),
    "rsqrt": (lambda mb, x, **_: mb.rsqrt(x=mb.square(x=x), epsilon=0.25), lambda x, **_: 1 / np.sqrt(x**2 + 0.25)),
    "pow": (lambda mb, x, **_: mb.pow(x=x, y=3.0), lambda x, **_: x**3),
    "add": (lambda mb, x, y, **_: mb.add(x=x, y=y), lambda x, y, **_: x + y),
    "add__constant": (lambda mb, x, **_: mb.add(x=x, y=column(VECTOR)), lambda x, **_: x + column(VECTOR)),
    "sub": (lambda mb, x, y, **_: mb.sub(x=x, y=y), lambda x, y, **_: x - y),
    "sub__from_constant": (lambda mb, x, **_: mb.sub(x=1.5, y=x), lambda x, **_: 1.5 - x),
    "mul": (lambda mb, x, y, **_: mb.mul(x=x, y=y), lambda x, y, **_: x * y),
    "real_div": (
        lambda mb, x, y, **_: mb.real_div(x=x, y=mb.exp(x=y)),
        lambda x, y, **_: x / np.exp(y),
    ),
    "matmul": (
        lambda mb, p, q, **_: mb.matmul(x=p, y=q, transpose_y=True),
        lambda p, q, **_: p @ q.swapaxes(-1, -2),
    ),
    "matmul__transpose_x": (
        lambda mb, p, q, **_: mb.matmul(x=p, y=q, transpose_x=True),
        lambda p, q, **_: p.swapaxes(-1, -2) @ q,
    ),
    "matmul__constant": (lambda mb, p, **_: mb.matmul(x=p, y=MATRIX, transpose_y=True), lambda p, **_: p @ MATRIX.T),
    "linear": (
        lambda mb, p, **_: mb.linear(x=p, weight=MATRIX, bias=BIAS[:5]),
        lambda p, **_: p @ MATRIX.T + BIAS[:5],
    ),
    "softmax": (lambda mb, x, **_: mb.softmax(x=x, axis=-1), lambda x, **_: softmax(x, -1)),
    "softmax__channels": (lambda mb, x, **_: mb.softmax(x=x, axis=1), lambda x, **_: softmax(x, 1)),
    "layer_norm": (
        lambda mb, x, **_: mb.layer_norm(x=x, axes=[1], epsilon=1e-3),
        lambda x, **_: layer_norm(x, (1,), 1e-3),
    ),
    "layer_norm__channels_affine": (
        lambda mb, x, **_: mb.layer_norm(x=x, axes=[1], gamma=POSITIVE, beta=VECTOR, epsilon=1e-3),
        lambda x, **_: layer_norm(x, (1,), 1e-3, column(POSITIVE), column(VECTOR)),
    ),
    "layer_norm__last_axes": (
        lambda mb, p, **_: mb.layer_norm(x=p, axes=[-1, -2], epsilon=1e-5),
        lambda p, **_: layer_norm(p, (2, 3), 1e-5),
    ),
    "reduce_mean": (
        lambda mb, x, **_: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
        lambda x, **_: x.mean((2, 3), keepdims=True),
    ),
    "reduce_sum": (lambda mb, x, **_: mb.reduce_sum(x=x, axes=[1]), lambda x, **_: x.sum(1)),
    "reduce_max": (lambda mb, x, **_: mb.reduce_max(x=x, axes=[-1], keep_dims=False), lambda x, **_: x.max(-1)),
    "reshape": (lambda mb, x, **_: mb.reshape(x=x, shape=[1, 4, 2, 60]), lambda x, **_: x.reshape(1, 4, 2, 60)),
    "reshape__inferred": (lambda mb, x, **_: mb.reshape(x=x, shape=[2, -1, 5]), lambda x, **_: x.reshape(2, -1, 5)),
    "reshape__kept_size": (lambda mb, x, **_: mb.reshape(x=x, shape=[-1, 0]), lambda x, **_: x.reshape(-1, 10)),
    "transpose": (
        lambda mb, x, **_: mb.transpose(x=x, perm=[0, 2, 3, 1]),
        lambda x, **_: x.transpose(0, 2, 3, 1),
    ),
    "expand_dims": (lambda mb, t, **_: mb.expand_dims(x=t, axes=[0, -1]), lambda t, **_: t[None, ..., None]),
    "squeeze": (lambda mb, x, **_: mb.squeeze(x=x, axes=[0]), lambda x, **_: x[0]),
    "squeeze__all": (lambda mb, t, **_: mb.squeeze(x=t), lambda t, **_: t[0]),
    "identity": (lambda mb, x, **_: mb.identity(x=x), lambda x, **_: x),
    "concat": (
        lambda mb, x, y, **_: mb.concat(values=[x, y, x], axis=1),
        lambda x, y, **_: np.concatenate([x, y, x], 1),
    ),
    "concat__interleaved": (
        lambda mb, x, y, **_: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y, **_: np.stack([x, y], 2).reshape(1, 16, 6, 10),
    ),
    "split": (
        lambda mb, x, **_: mb.sub(**dict(zip("xy", mb.split(x=x, num_splits=2, axis=1), strict=True))),
        lambda x, **_: x[:, :4] - x[:, 4:],
    ),
    "split__sizes": (
        lambda mb, x, **_: mb.split(x=x, split_sizes=[1, 5, 2], axis=1)[1],
        lambda x, **_: x[:, 1:6],
    ),
    "slice_by_index": (
        lambda mb, x, **_: mb.slice_by_index(x=x, begin=[0, 1, -4, 0], end=[1, 7, -1, 9], stride=[1, 2, 1, 3]),
        lambda x, **_: x[0:1, 1:7:2, -4:-1, 0:9:3],
    ),
    "slice_by_index__masks": (
        lambda mb, x, **_: mb.slice_by_index(
            x=x,
            begin=[0, 3, 2, 8],
            end=[0, 0, 5, 1],
            stride=[1, 1, 1, -2],
            begin_mask=[True, False, False, False],
            end_mask=[True, False, True, False],
            squeeze_mask=[False, True, False, False],
        ),
        lambda x, **_: x[:, 3, 2:, 8:1:-2],
    ),
    "cast": (
        lambda mb, x, **_: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"),
        lambda x, **_: np.trunc(x),
    ),
    "quantize": (
        lambda mb, x, **_: mb.cast(x=mb.quantize(input=x, scale=np.float32(0.02), output_dtype="int8"), dtype="fp32"),
        lambda x, **_: np.clip(np.round(x / np.float32(0.02)), -128, 127),
    ),
    "quantize__per_channel": (
        lambda mb, x, **_: mb.cast(
            x=mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="int8"), dtype="fp32"
        ),
        lambda x, **_: np.clip(np.round(x / column(SCALES)) + column(ZEROS), -128, 127),
    ),
    "dequantize": (
        lambda mb, x, **_: mb.dequantize(
            input=mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="int8"),
            scale=SCALES,
            zero_point=ZEROS,
            axis=1,
        ),
        lambda x, **_: (
            (np.clip(np.round(x / column(SCALES)) + column(ZEROS), -128, 127) - column(ZEROS)) * column(SCALES)
        ),
    ),
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in INPUTS.items()}


@pytest.fixture(scope="module")
def package(save_program: Callable[..., Path]) -> Path:
    """One program with all cases as outputs."""

    def build(mb: Any, **tensors: Any) -> Any:
        return [mb.identity(x=make(mb, **tensors), name=f"case_{name}") for name, (make, _) in CASES.items()]

    return save_program(build, INPUTS)


@pytest.fixture(scope="module")
def results(package: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return Executor(package).run(inputs)


@pytest.mark.parametrize("name", CASES)
def test_operation_agrees_with_numpy(
    name: str, inputs: dict[str, np.ndarray], results: dict[str, np.ndarray], tolerance: Callable[[str], float]
) -> None:
    expected = CASES[name][1](**inputs)
    found = results[f"case_{name}"]
    assert found.shape == expected.shape
    assert np.isfinite(found).all() and np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= tolerance("op_float32") * max(np.abs(expected).max(), 1)


def test_every_case_is_of_a_kind() -> None:
    assert {name.split("__")[0] for name in CASES} <= set(KINDS)


def test_ceil_mode_pool_averages_only_existing_values(save_program: Callable[..., Path]) -> None:
    path = save_program(
        lambda mb, x: mb.avg_pool(
            x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True, name="out"
        ),
        {"x": (1, 1, 3, 3)},
    )
    assert read_package(path).outputs[0].shape == (1, 1, 2, 2)
    found = Executor(path).run({"x": np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)})["out"]
    np.testing.assert_allclose(found, [[[[2, 3.5], [6.5, 8]]]])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_integer_parameter_runs_or_raises_one_error(
    package: Path,
    inputs: dict[str, np.ndarray],
    block_of: Callable[[Any], Any],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    """Strides of 0, axes out of range and padding of 2^31 do not crash or raise another exception."""
    damaged = tmp_path_factory.getbasetemp() / "integers.mlpackage"
    shutil.copytree(package, damaged, dirs_exist_ok=True)
    path = damaged / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = model_class()()
    model.ParseFromString(path.read_bytes())
    tensors = [o.attributes["val"].immediateValue.tensor for o in block_of(model).operations if o.type == "const"]
    victims = [tensor.ints.values for tensor in tensors if tensor.WhichOneof("value") == "ints"]
    values = victims[data.draw(st.integers(0, len(victims) - 1))]
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(
        st.sampled_from([0, -1, -2, 1, 2, 3, 7, 100, 2**31 - 1, -(2**31)])
    )
    path.write_bytes(model.SerializeToString())
    try:
        found = Executor(damaged).run(inputs)
    except PackageError as error:
        assert "\n" not in str(error)
    else:
        assert set(found) == {f"case_{name}" for name in CASES}
