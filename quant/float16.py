"""The float16 simulation of a torch network: results, weights and biases are rounded as in its package.

Sums inside an operation stay float32, as in the executor's float16 mode. Unlike the executor it needs no package, so a
search can try plans before conversion.
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
"""The operations whose results are rounded. Where torch has two names, the one used depends on gradient recording."""

ROUNDED_OF_TWO = frozenset((ATEN.add, ATEN.mul))
"""The operations that are rounded if their two inputs are different tensors.

A square, or an added epsilon, is inside a layer norm, which is one operation of the package.
"""


class Float16Results(TorchDispatchMode):
    """The mode in which float32 networks compute like their float16 packages."""

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
    """Returns float32 values rounded to float16, in the same layout."""
    return tensor.to(torch.float16).to(torch.float32)


def float16_outputs(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Computes `image`, (1, 3, S, S) float32, approximately as the network's package does."""
    with torch.inference_mode(), Float16Results():
        return network(rounded(torch.from_numpy(image))).numpy()
