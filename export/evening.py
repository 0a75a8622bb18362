"""The channels of int8 inputs evened out: factors that move between a convolution and the operation before it.

`fc1` follows a depthwise convolution, `qkv` a layer norm, and `proj` the attention, whose results are sums of values.
All are linear in a channel, and the factors are powers of two, so results stay. `fc2` follows a GELU, which is not
linear, and has no factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..models.errors import UsageError
from ..models.fastvit import bias_of
from .rewrite import EngineAttentionBlock, EngineFFN

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""The digits of exponents in a manifest, one for each channel: `0` is 1, `3` is a division by 8."""


def even_channels(network: nn.Module, exponents: Mapping[str, Sequence[int]]) -> None:
    """Multiplies weights in place, so that the inputs of convolutions are divided by 2 to the power of `exponents`.

    The keys are the names of `fc1`, `qkv` and `proj` convolutions. The opposite exponents restore the weights exactly.

    Raises:
        UsageError: a name is not one of these, or has another number of channels.
    """
    for name, powers in exponents.items():
        parent, _, kind = name.rpartition(".")
        block = dict(network.named_modules()).get(parent)
        reader = getattr(block, kind, None)
        if not isinstance(reader, nn.Conv2d) or reader.in_channels != len(powers):
            raise UsageError(f"evened: {name!r:.80} has no {len(powers)} channels in this encoder. Export again.")
        factors = torch.from_numpy(np.exp2(np.asarray(powers, np.float32)))
        if isinstance(block, EngineFFN) and kind == "fc1":
            divide_outputs(block.conv, slice(None), factors)
        elif isinstance(block, EngineAttentionBlock) and kind == "qkv":
            gain = (torch.ones(1) if block.gain is None else block.gain.flatten()) / factors
            block.gain = None if bool((gain == 1).all()) else gain[:, None, None]  # (C, 1, 1)
        elif isinstance(block, EngineAttentionBlock) and kind == "proj":
            divide_outputs(block.qkv, slice(2 * len(powers), None), factors)  # the values
        else:
            raise UsageError(f"evened: {name!r:.80} follows no linear operation. Export again.")
        reader.weight.data = reader.weight.data * factors[:, None, None]


def divide_outputs(conv: nn.Conv2d, rows: slice, factors: Tensor) -> None:
    """Divides output channels of a convolution. Its tensors are replaced, as they may be shared."""
    weight, bias = conv.weight.data.clone(), bias_of(conv).data.clone()
    weight[rows] /= factors[:, None, None, None]
    bias[rows] /= factors
    conv.weight.data, bias_of(conv).data = weight, bias


def as_digits(exponents: Iterable[int]) -> str:
    """Returns a manifest's form of exponents: a digit per channel."""
    return "".join(DIGITS[-power] for power in exponents)


def from_digits(digits: str) -> tuple[int, ...]:
    """Returns the exponents of a manifest's digits. Raises UsageError for other characters."""
    if not isinstance(digits, str) or not set(digits) <= set(DIGITS):
        raise UsageError(f"evened: exponents must be digits and small letters (got {digits!r:.40}). Export again.")
    return tuple(-DIGITS.index(digit) for digit in digits)
