"""Changes of exported folders, as if an export had written them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fastvlm.export.model_folder import file_table
from fastvlm.models.folder_layout import PACKAGE_NAME
from fastvlm.models.mlprogram.package import read_package
from fastvlm.models.mlprogram.program import Value


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes tensors and signs the manifest again, as if export had written them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    sign(folder)


def sign(folder: Path, **recipe: object) -> None:
    """Writes the hashes of the folder's files into its manifest, and `recipe` into its recipe."""
    manifest = json.loads((folder / "fastvlm.json").read_text())
    manifest["files"] = file_table(folder)
    manifest["recipe"] |= recipe
    (folder / "fastvlm.json").write_text(json.dumps(manifest))


def weight_of(folder: Path, place: int, part: str = "weight") -> Value:
    """Returns the stored numbers of the convolution at `place`: its weight, or its scales."""
    program = read_package(folder / PACKAGE_NAME)
    convolution = [operation for operation in program.operations if operation.kind == "conv"][place]
    (name,) = convolution.inputs["bias" if part == "bias" else "weight"]
    values = program.producers[name].values
    return values["scale"] if part == "scale" else values.get("quantized_data", values.get("val"))


def edit_package(folder: Path, value: Value, change: Callable[[np.ndarray], None]) -> None:
    """Changes numbers in the package's weight file, and signs the manifest again."""
    file = folder / PACKAGE_NAME / "Data/com.apple.CoreML/weights/weight.bin"
    content, numbers = bytearray(file.read_bytes()), value.array().copy()
    start = content.find(numbers.tobytes())
    assert start > 0
    change(numbers)
    content[start : start + numbers.nbytes] = numbers.tobytes()
    file.write_bytes(content)
    sign(folder)


def swap_rows(numbers: np.ndarray) -> None:
    """Swaps two rows."""
    numbers[[3, 40]] = numbers[[40, 3]]
