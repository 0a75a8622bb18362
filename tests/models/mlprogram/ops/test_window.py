"""Convolutions and pools with drawn parameters, compared with torch and with coremltools' shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import PackageError

Agree = Callable[..., None]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padded(x: np.ndarray, pads: list[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    pairs = [(0, 0), (0, 0), *pads]
    return torch.from_numpy(np.pad(x, pairs, constant_values=value))


def flat(pads: list[Any]) -> list[int]:
    return [amount for pair in pads for amount in pair]


@st.composite
def windows(draw: st.DrawFn, dilated: bool = True) -> dict[str, Any]:
    """Kernel, strides, dilations and padding over 1 to 3 axes of size 5 to 9."""
    axes = draw(st.integers(1, 3))
    several = lambda low, high: [draw(st.integers(low, high)) for _ in range(axes)]  # noqa: E731
    dilations = several(1, 2) if dilated else [1] * axes
    return {
        "grid": several(5, 9),
        "kernel": several(1, 3),
        "strides": several(1, 3),
        "dilations": dilations,
        "pads": [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(axes)],
    }


@settings(max_examples=15)
@given(windows(), st.sampled_from([1, 2]), st.booleans())
def test_conv_is_torchs_on_padded_input(agree: Agree, w: dict[str, Any], groups: int, has_bias: bool) -> None:
    x, weight = normal(1, 2, 4, *w["grid"]), normal(2, 6, 4 // groups, *w["kernel"])
    bias = normal(3, 6) if has_bias else None
    expected = CONV[len(w["grid"])](
        padded(x, w["pads"]), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        w["strides"], 0, w["dilations"], groups,
    )  # fmt: skip
    agree(
        "conv", expected.numpy(), x=x, weight=weight, strides=w["strides"], dilations=w["dilations"], groups=groups,
        pad_type="custom", pad=flat(w["pads"]), **({"bias": bias} if has_bias else {}),
    )  # fmt: skip


def test_conv_with_a_large_padding_runs(agree: Agree) -> None:
    x, weight = normal(1, 1, 2, 5, 6), normal(2, 3, 2, 3, 3)
    expected = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=20).numpy()
    agree("conv", expected, x=x, weight=weight, pad_type="custom", pad=[20] * 4)


def test_conv_with_an_absurd_padding_is_refused(evaluate: Callable[..., Any]) -> None:
    with pytest.raises(PackageError, match="padded input must have at most"):
        evaluate(
            "conv", infer=False, x=normal(1, 1, 2, 5, 6), weight=normal(2, 3, 2, 3, 3), pad_type="custom",
            pad=[2**28, 0, 0, 0], strides=[2**28, 1],
        )  # fmt: skip


@settings(max_examples=15)
@given(windows(), st.sampled_from([1, 2]), st.booleans())
def test_conv_transpose_is_torchs_cut(agree: Agree, w: dict[str, Any], groups: int, has_bias: bool) -> None:
    x, weight = normal(1, 1, 4, *w["grid"]), normal(2, 4, 3, *w["kernel"])
    bias = normal(3, 3 * groups) if has_bias else None
    whole = TRANSPOSED[len(w["grid"])](
        torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        w["strides"], 0, 0, groups, w["dilations"],
    ).numpy()  # fmt: skip
    cut = [slice(before, size - after) for (before, after), size in zip(w["pads"], whole.shape[2:], strict=True)]
    expected = whole[(slice(None), slice(None), *cut)]
    assume(expected.size)
    agree(
        "conv_transpose", expected, x=x, weight=weight, strides=w["strides"], dilations=w["dilations"], groups=groups,
        pad_type="custom", pad=flat(w["pads"]), **({"bias": bias} if has_bias else {}),
    )  # fmt: skip


def test_conv_transpose_with_output_padding_is_torchs(agree: Agree) -> None:
    x, weight, bias = normal(1, 1, 2, 5, 6), normal(2, 2, 3, 3, 3), normal(3, 3)
    tensors = [torch.from_numpy(array) for array in (x, weight, bias)]
    expected = F.conv_transpose2d(*tensors, stride=2, padding=1, output_padding=1).numpy()
    pads = {"pad_type": "custom", "pad": [1, 1, 1, 1], "output_shape": list(expected.shape)}
    agree("conv_transpose", expected, x=x, weight=weight, bias=bias, strides=[2, 2], **pads)
    even = F.conv_transpose2d(tensors[0], torch.ones(2, 1, 2, 2), stride=2).numpy()
    agree("conv_transpose", even, x=x, weight=np.ones((2, 1, 2, 2), np.float32), strides=[2, 2], pad_type="same")


@settings(max_examples=15)
@given(windows(dilated=False), st.booleans(), st.booleans())
def test_pools_agree_with_torch(agree: Agree, w: dict[str, Any], ceil: bool, exclude: bool) -> None:
    axes = len(w["grid"])
    ceil = ceil and axes < 3  # MIL has no ceil mode for volumes
    pads = [(min(before, kernel // 2),) * 2 for (before, _), kernel in zip(w["pads"], w["kernel"], strict=True)]
    steps = zip(w["strides"], w["kernel"], strict=True)
    assume(not ceil or all(stride <= kernel for stride, kernel in steps))  # else torch drops windows without values
    x, padding = torch.from_numpy(normal(1, 1, 2, *w["grid"])), [before for before, _ in pads]
    shared = {
        "x": x.numpy(), "kernel_sizes": w["kernel"], "strides": w["strides"], "ceil_mode": ceil, "pad_type": "custom",
        "pad": flat(pads),
    }  # fmt: skip
    largest = MAX_POOL[axes](x, w["kernel"], w["strides"], padding, 1, ceil)
    agree("max_pool", largest.numpy(), **shared)
    average = AVG_POOL[axes](x, w["kernel"], w["strides"], padding, ceil, not exclude)
    agree("avg_pool", average.numpy(), exclude_padding_from_average=exclude, **shared)


def test_pool_that_rounds_up_drops_windows_in_the_padding(agree: Agree) -> None:
    x = torch.from_numpy(normal(1, 1, 2, 5, 6))
    for kernel in ([2, 2], [2, 3], [3, 2]):
        given = {"kernel_sizes": kernel, "strides": [2, 2], "pad_type": "custom", "pad": [1] * 4, "ceil_mode": True}
        agree("max_pool", F.max_pool2d(x, kernel, 2, 1, ceil_mode=True).numpy(), x=x.numpy(), **given)
        agree("avg_pool", F.avg_pool2d(x, kernel, 2, 1, ceil_mode=True).numpy(), x=x.numpy(), **given)


@settings(max_examples=10)
@given(windows(dilated=False))
def test_pools_with_uneven_padding_agree(agree: Agree, w: dict[str, Any]) -> None:
    axes, x = len(w["grid"]), normal(1, 1, 2, *w["grid"])
    pads = [
        tuple(min(amount, kernel - 1) for amount in pair) for pair, kernel in zip(w["pads"], w["kernel"], strict=True)
    ]
    shared = {
        "x": x, "kernel_sizes": w["kernel"], "strides": w["strides"], "pad_type": "custom",
        "pad": flat(pads),
    }  # fmt: skip
    agree("max_pool", MAX_POOL[axes](padded(x, pads, -np.inf), w["kernel"], w["strides"]).numpy(), **shared)
    agree("avg_pool", AVG_POOL[axes](padded(x, pads), w["kernel"], w["strides"]).numpy(), **shared)
    squares = AVG_POOL[axes](padded(x, pads).square(), w["kernel"], w["strides"]) * np.prod(w["kernel"])
    if axes < 3:
        agree("l2_pool", squares.sqrt().numpy(), **shared)


@pytest.mark.parametrize("pad_type", ["same", "same_lower"])
def test_same_padding_keeps_the_grid(agree: Agree, pad_type: str) -> None:
    x, weight = normal(1, 1, 2, 6, 7), normal(2, 3, 2, 4, 3)
    rows = (1, 2) if pad_type == "same" else (2, 1)
    expected = F.conv2d(padded(x, [rows, (1, 1)]), torch.from_numpy(weight)).numpy()
    agree("conv", expected, "iOS16", x=x, weight=weight, pad_type=pad_type)
