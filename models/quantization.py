"""The `quantization` object of `config.json`: MLX's affine groups, with exceptions for single layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .files import field as json_field

GROUP_SIZES = (32, 64, 128)
"""The group sizes of MLX's affine quantization, in weights."""
BITS = (2, 3, 4, 5, 6, 8)
"""The widths of MLX's affine quantization, in bits."""


@dataclass(frozen=True)
class Affine:
    """An affine quantization: `bits` per weight, a float16 scale and bias per `group_size` neighbours of a row."""

    group_size: int
    bits: int

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES or self.bits not in BITS:
            raise ConfigError(
                f"config.json: quantization must have group_size of {GROUP_SIZES} and bits of {BITS}, "
                f"got {self.group_size} and {self.bits}"
            )

    @property
    def bits_per_weight(self) -> float:
        """The bits per weight with scale and bias, as mlx-lm counts: 4.5 for 4 bits in groups of 64."""
        return self.bits + 32 / self.group_size

    def as_dict(self) -> dict[str, int]:
        """Returns the object for `config.json`."""
        return {"group_size": self.group_size, "bits": self.bits}


@dataclass(frozen=True)
class Quantization:
    """The default for every quantized layer, and the exceptions by saved name.

    mlx-lm's form is `{"group_size": 64, "bits": 4, "language_model.lm_head": {"group_size": 64, "bits": 8}}`. A layer
    is quantized if the weights have its `.scales`.
    """

    default: Affine
    layers: Mapping[str, Affine] = field(default_factory=dict)

    def of(self, layer: str) -> Affine:
        """Returns the quantization of `layer`."""
        return self.layers.get(layer, self.default)

    def as_dict(self) -> dict[str, Any]:
        """Returns the object for `config.json`."""
        return {**self.default.as_dict(), **{name: affine.as_dict() for name, affine in self.layers.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """Reads the object. `false` marks an unquantized layer, which is also evident from the weights.

        Raises:
            ConfigError: a field is missing, of a wrong type or not supported by MLX, or the mode is not affine.
        """
        nested = {name: value for name, value in values.items() if isinstance(value, Mapping)}
        malformed = [
            name
            for name, value in values.items()
            if name not in ("group_size", "bits", "mode") and name not in nested and value is not False
        ]
        if malformed:
            raise ConfigError(
                f"config.json: quantization: {malformed[0]!r:.80} must be an object, got {values[malformed[0]]!r:.40}"
            )
        return cls(_affine(values), {name: _affine(value) for name, value in nested.items()})


def _affine(values: Mapping[str, Any]) -> Affine:
    mode = json_field(values, "mode", str, "affine")
    if mode != "affine":
        raise ConfigError(f"config.json: quantization mode must be 'affine', got {mode!r:.40}")
    return Affine(json_field(values, "group_size", int), json_field(values, "bits", int))
