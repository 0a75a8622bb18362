"""A package as an object with coremltools' `predict`: arrays and images in, arrays, images and labels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from ..errors import PackageError, UsageError, listed
from .executor import Executor, Precision
from .package import read_package
from .program import Feature, Shape, TensorType

IMAGE_MODES = {"RGB": "RGB", "BGR": "RGB", "GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F"}
"""Pillow's mode of an image by Core ML's color layout."""


def load(path: str | Path, function_name: str | None = None, *, precision: Precision = "float32") -> Model:
    """Loads a `.mlpackage` with an ML Program, on any machine.

    Args:
        path: the package.
        function_name: the function to run, by default the package's own default, `main` in nearly all.
        precision: `float32` computes float16 tensors in float32. `float16` rounds every result of type float16, as
            the Neural Engine stores it. `float16-accumulate` also sums products of matrices in float16, as Apple's
            Core AI interpreter does.

    Raises:
        PackageError: the package cannot be read, or has operations that cannot be run. The message lists them.
        MachineError: coremltools is not installed.
        UsageError: the precision is unknown.
    """
    return Model(Executor(read_package(path, function_name), precision))


class State:
    """The values of a model's states, such as a KV cache, which `predict` changes. `Model.make_state` makes one."""

    def __init__(self, tensors: dict[str, torch.Tensor], types: Mapping[str, TensorType]) -> None:
        self.tensors = tensors
        self._types = types

    def read_state(self, name: str) -> np.ndarray:
        """Returns a copy of a state, in the type that the program declares.

        Raises:
            UsageError: the model has no such state.
        """
        dtype = {"fp16": np.float16}.get(self._types[self._known(name)].dtype)
        return np.array(self.tensors[name].numpy(), dtype=dtype)

    def write_state(self, name: str, value: np.ndarray) -> None:
        """Overwrites a state with an array of its shape.

        Raises:
            UsageError: the model has no such state, or the array has another shape.
        """
        tensor = self.tensors[self._known(name)]
        array = np.asarray(value)
        if array.shape != tuple(tensor.shape) or array.dtype.kind not in "biuf":
            raise UsageError(f"value of {name} must be numbers of shape {list(tensor.shape)} (got {list(array.shape)})")
        tensor.copy_(torch.from_numpy(np.array(array)))

    def _known(self, name: str) -> str:
        if name not in self.tensors:
            raise UsageError(f"the state must be one of {', '.join(self.tensors) or 'none'} (got {name!r})")
        return name


class Model:
    """A loaded package, with the methods of `coremltools.models.MLModel`. Not thread-safe. `load` makes one.

    Attributes:
        executor: the executor below, with ranges, overflows and single results.
        program: the program as it was read.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.program = executor.program

    @overload
    def predict(self, data: Mapping[str, Any], state: State | None = None) -> dict[str, Any]: ...
    @overload
    def predict(self, data: Sequence[Mapping[str, Any]], state: State | None = None) -> list[dict[str, Any]]: ...

    def predict(
        self, data: Mapping[str, Any] | Sequence[Mapping[str, Any]], state: State | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Runs the model once, or once for each item of a list, as `MLModel.predict` does.

        Inputs are arrays of the declared shape, and Pillow images or arrays (1, C, H, W) from 0 to 255 where an image
        is declared. Optional inputs may be left out. Results are arrays, Pillow images where an image is declared,
        and a classifier's label and dictionary of probabilities. `state` is changed in place.

        Raises:
            UsageError: an input is missing, unexpected, or of a size that the model does not declare.
            PackageError: a value is NaN or of another type, or an operation fails.
        """
        if not isinstance(data, Mapping):
            return [self.predict(item, state) for item in data]
        results = self.executor.run(self._arrays(data), None if state is None else state.tensors)
        return {name: self._result(name, value) for name, value in results.items()}

    def make_state(self) -> State:
        """Returns a new state of zeros."""
        return State(self.executor.make_state(), {tensor.name: tensor for tensor in self.program.states})

    def _arrays(self, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        declared = {tensor.name: tensor for tensor in self.program.inputs}
        features = {name: self.program.features.get(name, Feature()) for name in declared}
        missing = [name for name in declared if name not in data and features[name].default is None]
        unexpected = [name for name in data if name not in declared]
        if missing or unexpected:
            wanted = listed(f"{tensor.name} {tensor}" for tensor in declared.values())
            raise UsageError(f"data must have the inputs {wanted} (got {listed(map(str, data)) or 'none'})")
        return {
            name: _array(tensor, features[name], data[name])
            if name in data
            else np.full(_default_shape(tensor, features[name]), features[name].default)
            for name, tensor in declared.items()
        }

    def _result(self, name: str, value: Any) -> Any:
        color = self.program.features.get(name, Feature()).color
        return image_of(value, color) if color else value


def _default_shape(tensor: TensorType, feature: Feature) -> Shape:
    return tensor.shape if tensor.is_fixed else feature.shape


def _array(tensor: TensorType, feature: Feature, value: Any) -> np.ndarray:
    """Returns an input as an array, after its size is compared with the described ones."""
    if isinstance(value, Image.Image):
        if not feature.color:
            raise UsageError(f"input {tensor.name}: must be an array of {tensor} (got an image)")
        _check_size(tensor.name, feature, (value.height, value.width))
        return array_of(value, feature.color)
    array = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
    _check_size(tensor.name, feature, array.shape[-2:] if feature.color else array.shape)
    return array


def _check_size(name: str, feature: Feature, shape: Shape) -> None:
    if not feature.allows(shape):
        found = " x ".join(map(str, shape)) or "a scalar"
        axes = " (height x width)" if feature.color else ""
        raise UsageError(f"input {name}: size must be {feature.sizes()}{axes} (got {found}). Resize it first.")


def array_of(image: Image.Image, color: str) -> np.ndarray:
    """Returns an image as (1, C, H, W) float32 from 0 to 255, in Core ML's color layout."""
    pixels = np.asarray(image.convert(IMAGE_MODES[color]), dtype=np.float32)
    if pixels.ndim == 2:
        return pixels[None, None]
    return (pixels[..., ::-1] if color == "BGR" else pixels).transpose(2, 0, 1)[None]


def image_of(array: np.ndarray, color: str) -> Image.Image:
    """Returns (1, C, H, W) from 0 to 255 as an image. Values are rounded and clipped, but for floating grey.

    Raises:
        PackageError: the array is not one image of this color layout.
    """
    channels = 1 if color.startswith("GRAYSCALE") else 3
    if array.ndim != 4 or array.shape[:2] != (1, channels):
        raise PackageError(f"the {color} image must have shape [1, {channels}, H, W] (got {list(array.shape)})")
    if color == "GRAYSCALE_FLOAT16":
        return Image.fromarray(array[0, 0].astype(np.float32))
    pixels = np.clip(np.rint(np.nan_to_num(array[0])), 0, 255).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    if channels == 1:
        return Image.fromarray(pixels[..., 0])
    return Image.fromarray(np.ascontiguousarray(pixels[..., ::-1] if color == "BGR" else pixels))
