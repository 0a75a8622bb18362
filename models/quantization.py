"""The `quantization` object of `config.json`: MLX's affine groups, with exceptions for single layers.

The weights of other quantizers are recognized here too, since their packed tensors look like a damaged checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, WeightsError, listed
from .files import field as json_field
from .safetensors_files import TensorInfo

GROUP_SIZES = (32, 64, 128)
"""The group sizes of MLX's affine quantization, in weights."""
BITS = (2, 3, 4, 5, 6, 8)
"""The widths of MLX's affine quantization, in bits."""


FOREIGN_METHODS = {
    "bitsandbytes": "Load it with transformers, call model.dequantize(), and save_pretrained() the result.",
    "gptq": "Pass the checkpoint that it was quantized from.",
    "awq": "Pass the checkpoint that it was quantized from.",
    "compressed-tensors": "Pass the checkpoint that it was quantized from.",
    "fp8": "Load it with transformers, call model.dequantize(), and save_pretrained() the result.",
    "torchao": "Pass the checkpoint that it was quantized from.",
    "quanto": "Pass the checkpoint that it was quantized from.",
    "hqq": "Pass the checkpoint that it was quantized from.",
}
"""The quantizers whose weights are refused, by `quant_method`, and how to undo each."""

FOREIGN_SUFFIXES = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "gptq",
    ".qzeros": "gptq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    "._data": "quanto",
    ".W_q": "hqq",
}
"""The quantizer that writes tensors whose names end so."""
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


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


def check_not_foreign(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Returns a note if only the config has another quantizer's settings, and the weights are floating-point.

    Raises:
        WeightsError: the weights are quantized by another tool than MLX. The message has how to undo it.
    """
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, Mapping) else None
    method = method if isinstance(method, str) else None
    found = {name: by for name in tensors for suffix, by in FOREIGN_SUFFIXES.items() if name.endswith(suffix)}
    found |= {name: "fp8" for name, info in tensors.items() if info.dtype in FLOAT8}
    found |= {name: "bitsandbytes" for name, info in tensors.items() if info.dtype == "U8" and info.shape[1:] == (1,)}
    if not found:
        if method is None:
            return ()
        return (f"config.json has quantization_config of {method}, but the weights are floating-point: it is ignored",)
    quantizer = method or next(iter(found.values()))
    remedy = FOREIGN_METHODS.get(quantizer, "Pass the checkpoint that it was quantized from.")
    raise WeightsError(f"the weights are quantized by {quantizer} (got {listed(sorted(found), 2)}). {remedy}")
