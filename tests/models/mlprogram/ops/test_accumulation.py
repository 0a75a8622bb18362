"""Sums in float16, compared with numpy step by step, and with Apple's Core AI interpreter on single layers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.mlprogram.executor import Executor

MODE = "float16-accumulate"

needs_coreai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None,
    reason="the extra coreai is not installed (Apple's wheels: Linux x86_64, macOS 26 and later)",
)


def halves(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Returns normal values that float16 holds, float32."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float16).astype(np.float32)


def summed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns x @ y with each product and each sum rounded to float16, by numpy's own float16."""
    total = np.zeros(np.broadcast_shapes((*x.shape[:-1], 1), (*y.shape[:-2], 1, y.shape[-1])), np.float16)
    for k in range(x.shape[-1]):
        total = total + x[..., k, None].astype(np.float16) * y[..., k, None, :].astype(np.float16)
    return total


def run(path: Path, precision: Any = MODE, **inputs: np.ndarray) -> np.ndarray:
    (found,) = Executor(path, precision).run(inputs).values()
    return found.astype(np.float16)


@pytest.mark.parametrize(("transpose_x", "transpose_y"), [(False, False), (True, True)])
def test_matmul_sums_in_float16(save_program: Callable[..., Path], transpose_x: bool, transpose_y: bool) -> None:
    x, y = (
        halves(1, 3, 40, 5) if transpose_x else halves(1, 3, 5, 40),
        halves(2, 7, 40) if transpose_y else halves(2, 40, 7),
    )

    def build(mb: Any, x: Any, y: Any) -> Any:
        return mb.matmul(x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y)

    path = save_program(build, {"x": x.shape, "y": y.shape}, half=True)
    expected = summed(x.swapaxes(1, 2) if transpose_x else x, y.T if transpose_y else y)
    np.testing.assert_array_equal(run(path, x=x, y=y), expected)
    assert not np.array_equal(run(path, "float16", x=x, y=y), expected)


def test_float32_products_keep_float32_sums(save_program: Callable[..., Path]) -> None:
    x, y = halves(1, 4, 300), halves(2, 300, 4)
    path = save_program(lambda mb, x, y: mb.matmul(x=x, y=y), {"x": x.shape, "y": y.shape})
    found = [Executor(path, precision).run({"x": x, "y": y}) for precision in ("float32", MODE)]
    for one, other in zip(*(result.values() for result in found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_linear_adds_the_bias_to_the_rounded_sum(save_program: Callable[..., Path]) -> None:
    x, weight, bias = halves(1, 6, 50), halves(2, 9, 50, scale=0.1), halves(3, 9)
    path = save_program(lambda mb, x: mb.linear(x=x, weight=weight, bias=bias), {"x": x.shape}, half=True)
    np.testing.assert_array_equal(run(path, x=x), summed(x, weight.T) + bias.astype(np.float16))


def test_einsum_is_the_same_product(save_program: Callable[..., Path]) -> None:
    x, y = halves(1, 1, 3, 4, 40), halves(2, 1, 40, 4, 6)
    path = save_program(
        lambda mb, x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"), {"x": x.shape, "y": y.shape}, half=True
    )
    expected = summed(x.transpose(0, 2, 1, 3), y.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(run(path, x=x, y=y), expected)


def test_attention_sums_scores_and_values_in_float16(save_program: Callable[..., Path]) -> None:
    query, key, value = halves(1, 1, 2, 5, 16), halves(2, 1, 2, 30, 16), halves(3, 1, 2, 30, 8)
    mask = np.where(np.arange(30) > 20, -np.inf, 0).astype(np.float16)[None]

    def build(mb: Any, **given: Any) -> Any:
        return mb.scaled_dot_product_attention(**given, attn_mask=mask)

    inputs = {"query": query, "key": key, "value": value}
    path = save_program(build, {name: array.shape for name, array in inputs.items()}, "iOS18", half=True)
    scores = summed((query / 4).astype(np.float16), key.swapaxes(-1, -2)).astype(np.float32) + mask
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float16)
    found, expected = run(path, **inputs), summed(weights, value)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # a softmax may round to a neighbour
    assert (found == expected).mean() > 0.9 > (run(path, "float16", **inputs) == expected).mean()


def test_convolution_adds_the_bias_to_the_rounded_sum(save_program: Callable[..., Path]) -> None:
    x, bias = halves(1, 1, 8, 6, 6), halves(3, 16)
    for size in (1, 3):
        weight = halves(2, 16, 8, size, size, scale=0.2)
        plain = save_program(lambda mb, x, w=weight: mb.conv(x=x, weight=w), {"x": x.shape}, half=True)
        path = save_program(lambda mb, x, w=weight: mb.conv(x=x, weight=w, bias=bias), {"x": x.shape}, half=True)
        whole = run(plain, "float16", x=x)
        np.testing.assert_array_equal(run(plain, x=x), whole)
        np.testing.assert_array_equal(run(path, x=x), whole + bias.astype(np.float16).reshape(-1, 1, 1))
        assert not np.array_equal(run(path, "float16", x=x), run(path, x=x))


def test_gelu_is_rounded_in_steps(save_program: Callable[..., Path]) -> None:
    x = np.float32([-65504, -4, -1, 0, 0.5, 3, 65504])
    path = save_program(lambda mb, x: mb.gelu(x=x, mode="EXACT"), {"x": x.shape}, half=True)
    # The interpreter's values. Rounded once they are -0.0001267, -0.1587, 0.3457 and 2.996 in between.
    expected = np.float16([0, -0.000127, -0.1587, 0, 0.3457, 2.996, 65504])
    np.testing.assert_array_equal(run(path, x=x), expected)
    assert not np.array_equal(run(path, "float16", x=x), expected)


def test_overflow_of_a_sum_is_named(save_program: Callable[..., Path]) -> None:
    """The sum passes float16's range on the way. The whole would not."""
    x, y = np.full((1, 4), 200, np.float32), np.float32([[200], [200], [-200], [-200]])
    path = save_program(lambda mb, x, y: mb.matmul(x=x, y=y, name="out"), {"x": x.shape, "y": y.shape}, half=True)
    whole, parts = Executor(path, "float16"), Executor(path, MODE)
    for executor in (whole, parts):
        executor.run({"x": x, "y": y})
    assert whole.first_overflow is None
    assert parts.first_overflow is not None and parts.first_overflow.startswith("out")


LAYERS = """
import asyncio, pathlib, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch, torch.nn.functional as F
import coreai.authoring
from coreai.runtime import NDArray
from coreai_torch import TorchConverter, get_decomp_table

class Layers(torch.nn.Module):
    def forward(self, x, y, image, weight, bias):
        product = x @ y
        return (
            product, F.linear(x, y.T.contiguous(), bias), torch.einsum("mk,kn->mn", x, y),
            F.conv2d(image, weight), F.conv2d(image, weight, bias, padding=1),
            F.gelu(image), x.mean(1), x.softmax(1), F.layer_norm(x, (x.shape[1],)),
        )

folder = pathlib.Path(sys.argv[1])
given = {name: torch.from_numpy(array) for name, array in np.load(folder / "given.npz").items()}
exported = torch.export.export(Layers(), tuple(given.values())).run_decompositions(get_decomp_table())
names = "matmul linear einsum conv conv_bias gelu reduce_mean softmax layer_norm".split()
converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
converter.add_exported_program(exported, input_names=list(given), output_names=names)
asset = converter.to_coreai().save_asset(folder / "layers.aimodel")

async def run():
    async with asset.executable() as model:
        return await model.load_function("main")({name: NDArray(tensor.numpy()) for name, tensor in given.items()})

np.savez(folder / "found.npz", **{name: np.array(value.numpy()) for name, value in asyncio.run(run()).items()})
"""
"""A program that runs single layers in Apple's interpreter. A fault of the interpreter ends its process."""


@needs_coreai
@pytest.mark.slow
def test_single_layers_equal_apples_interpreter(save_program: Callable[..., Path], tmp_path: Path) -> None:
    x, y, bias = halves(1, 8, 600) + 1, halves(2, 600, 16, scale=0.1), halves(3, 16)
    image, weight = halves(4, 1, 8, 9, 9), halves(5, 16, 8, 3, 3, scale=0.2)
    given = {"x": x, "y": y, "image": image, "weight": weight, "bias": bias}
    np.savez(tmp_path / "given.npz", **{name: array.astype(np.float16) for name, array in given.items()})
    subprocess.run([sys.executable, "-c", LAYERS, str(tmp_path)], check=True, capture_output=True)

    def build(mb: Any, x: Any, y: Any, image: Any) -> Any:
        return [
            mb.matmul(x=x, y=y, name="matmul"),
            mb.linear(x=x, weight=given["y"].T.copy(), bias=bias, name="linear"),
            mb.conv(x=image, weight=weight, name="conv"),
            mb.conv(x=image, weight=weight, bias=bias, pad_type="custom", pad=[1] * 4, name="conv_bias"),
            mb.gelu(x=image, mode="EXACT", name="gelu"),
            mb.reduce_mean(x=x, axes=[1], name="reduce_mean"),
            mb.softmax(x=x, axis=1, name="softmax"),
            mb.layer_norm(x=x, axes=[1], name="layer_norm"),
        ]

    path = save_program(build, {"x": x.shape, "y": y.shape, "image": image.shape}, half=True)
    ours = Executor(path, MODE).run({"x": x, "y": y, "image": image})
    with np.load(tmp_path / "found.npz") as theirs:
        np.testing.assert_array_equal(theirs["einsum"], theirs["matmul"])
        for name in ("matmul", "linear", "conv", "conv_bias", "gelu", "reduce_mean", "softmax", "layer_norm"):
            same = (ours[name].astype(np.float16) == theirs[name]).mean()
            # float32 sums in another order may round to a neighbour, but float16 sums are equal
            assert same == 1 if name in ("matmul", "linear", "gelu") else same > 0.99, (name, same)
