"""How a tensor of Apple's layout stands in a file: under another name, with other axes, or packed in affine groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .quantization import Affine
from .safetensors_header import TensorInfo

Framework = Literal["pt", "mlx"]
ReadRaw = Callable[[str, Framework], Any]
"""A tensor's name in the file and the framework -> the array as it stands there."""


@dataclass(frozen=True)
class View:
    """A tensor as Apple's layout has it, and where it comes from."""

    name: str
    """In the file."""
    info: TensorInfo
    """Shape and dtype in Apple's layout."""
    permutation: tuple[int, ...] | None = None
    """Of the file's axes."""
    affine: Affine | None = None
    """How it is packed; `.scales` and `.biases` stand beside it."""

    def read(self, read_raw: ReadRaw, framework: Framework) -> Any:
        """Something that `torch.as_tensor` (pt) or `mx.array` (mlx) takes; expanded groups come as float32."""
        if self.affine is not None:
            return self._expanded(read_raw, self.affine)
        values = read_raw(self.name, framework)
        if self.permutation is None:
            return values
        return values.permute(self.permutation) if framework == "pt" else values.transpose(self.permutation)

    def _expanded(self, read_raw: ReadRaw, affine: Affine) -> Any:
        import numpy as np

        from ._mlx import mx
        from .mlx_cpu import dequantize

        layer = self.name.removesuffix(".weight")
        packed, scales, biases = (read_raw(f"{layer}.{part}", "mlx") for part in ("weight", "scales", "biases"))
        scales, biases = (part.astype(mx.float32) for part in (scales, biases))
        return np.array(dequantize(packed, scales, biases, affine))


def permuted(name: str, info: TensorInfo, permutation: tuple[int, ...]) -> View:
    """The view of a tensor whose file has its axes in another order."""
    return View(name, TensorInfo(tuple(info.shape[axis] for axis in permutation), info.dtype), permutation)


def expanded(name: str, info: TensorInfo, affine: Affine) -> View:
    """The view of a matrix that is packed into 32-bit words, `info` being the packed one's."""
    rows, words = info.shape
    return View(name, TensorInfo((rows, words * 32 // affine.bits), "F32"), affine=affine)
