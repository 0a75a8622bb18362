"""A torch network run as the engine runs its package: results, weights and biases rounded to float16.

Sums inside an operation stay float32, as in the executor's float16 mode. Unlike that one it needs no package: a search
tries plans with it that have not been converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
CONVOLUTIONS = frozenset((ATEN.conv2d, ATEN.convolution))
ROUNDED = CONVOLUTIONS | {ATEN.gelu, ATEN.matmul, ATEN.bmm, ATEN.softmax, ATEN._softmax, ATEN.relu, ATEN.sigmoid}
"""By both names where torch has two: which one comes depends on whether it records gradients."""

ROUNDED_OF_TWO = frozenset((ATEN.add, ATEN.mul))
"""Rounded where two different tensors meet. A square, or an epsilon added, is the inside of a layer norm, which is one
operation of the package."""


class Float16Results(TorchDispatchMode):
    """Within, float32 networks compute as their float16 packages do."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kind: Callable[..., Any] = func.overloadpacket
        if kind in CONVOLUTIONS:
            x, weight, bias, *rest = args
            args = (x, rounded(weight), None if bias is None else rounded(bias), *rest)
        result = func(*args, **(kwargs or {}))
        two = kind in ROUNDED_OF_TWO and isinstance(args[1], Tensor) and args[0] is not args[1]
        return rounded(result) if two or kind in ROUNDED else result


def rounded(tensor: Tensor) -> Tensor:
    """float32 rounded to float16, in the same layout."""
    return tensor.to(torch.float16).to(torch.float32)


def float16_outputs(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """What the network's package computes of `image` (1, 3, S, S) float32, near enough."""
    with torch.inference_mode(), Float16Results():
        return network(rounded(torch.from_numpy(image))).numpy()
