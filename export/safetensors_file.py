"""Safetensors files of MLX arrays, bfloat16 included: the library's own writer goes through numpy, which has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models._mlx import mx

DTYPE_NAMES = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
}
HEADER_ALIGNMENT = 8


def write_safetensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes `tensors`, each computed, copied and let go in turn; wide types first, so that all are aligned.

    Format: https://github.com/huggingface/safetensors#format. Equal tensors give equal bytes.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(raw(tensors[name]))


def raw(tensor: mx.array) -> bytes:
    """The tensor's bytes, row by row."""
    plain = tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor
    return np.array(plain, copy=False).tobytes()
