"""The float16 simulation of torch networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastvlm.quant.float16 import Float16Results, float16_outputs, rounded

IMAGE = np.random.default_rng(1).random((1, 3, 8, 8), dtype=np.float32)


def test_convolution_rounds_input_weight_bias_and_result() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3).requires_grad_(False)
    found = float16_outputs(nn.Sequential(conv), IMAGE)
    wide = nn.functional.conv2d(rounded(torch.from_numpy(IMAGE)), rounded(conv.weight), rounded(conv.bias))
    np.testing.assert_array_equal(found, rounded(wide).numpy())
    assert not np.array_equal(found, wide.numpy())


def test_sum_of_two_tensors_is_rounded_and_a_square_is_not() -> None:
    x, y = torch.tensor([1.0001, 3.0003]), torch.tensor([0.5001, 0.25])
    with torch.inference_mode(), Float16Results():
        total, square = x + y, x * x
    assert torch.equal(total, rounded(x + y)) and not torch.equal(total, x + y)
    assert torch.equal(square, x * x) and not torch.equal(square, rounded(x * x))
