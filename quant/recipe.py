"""Saved recipes: the decisions of an earlier export, read so that another export can repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from ..models.errors import UsageError
from ..models.files import read_json_object
from ..models.folder_layout import MANIFEST_NAME
from .decoder_scheme import DecoderScheme
from .encoder_scheme import EncoderScheme
from .schemes import WEIGHT_SCHEMES


@dataclass(frozen=True)
class SavedRecipe:
    """The decisions of an earlier export."""

    file: Path
    encoder: EncoderScheme
    decoder: DecoderScheme | None
    image_size: int | None
    calibration: Mapping[str, Any]
    """The manifest's entry about the calibration images. Empty if there is none."""
    settings: Mapping[str, Any]
    """The whole recipe as it was read."""


def read_recipe(path: str | Path) -> SavedRecipe:
    """Reads the recipe of an exported folder, of its `fastvlm.json`, or of a file with only a recipe.

    Raises:
        UsageError: the recipe cannot be read, lacks the encoder's weights, or has an invalid value.
    """
    file = Path(path).expanduser()
    file = file / MANIFEST_NAME if file.is_dir() else file
    content = read_json_object(file, UsageError)
    settings = content.get("recipe", content)
    try:
        _check_kind(settings)
        return SavedRecipe(
            file,
            EncoderScheme(
                _typed(settings, "quant", str),
                _typed(settings, "min_snr", float, None),
                _typed(settings, "max_bytes", int, None),
                _weights(settings),
                str(file),
            ),
            _decoder(settings),
            _typed(settings, "image_size", int, None),
            _calibration(settings),
            settings,
        )
    except UsageError as reason:
        raise UsageError(f"{file}: {reason}") from None


def _check_kind(settings: object) -> None:
    if not isinstance(settings, Mapping):
        raise UsageError(f"'recipe' must be a JSON object (got {type(settings).__name__}).")
    if settings.get("layout") == "mlx":
        raise UsageError("this export has the layout mlx, without a recipe for an encoder. Pass its arguments again.")


REQUIRED = object()
"""The default of values that a recipe must have."""

DECODER_FIELDS: Mapping[str, tuple[type, ...]] = {
    "bits": (int, str),
    "group_size": (int,),
    "quantize_embeddings": (bool,),
    "quantizer": (str,),
    "avg_bits": (int, float, NoneType),
    "layers": (dict,),
}
"""The JSON types of the fields of `DecoderScheme`. Bits of single layers are whole numbers."""


def _typed(settings: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    value = settings.get(key)
    if value is None and default is not REQUIRED:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise UsageError(f"{key!r} must be of type {kind.__name__} (got {value!r:.40}).")
    return kind(value)


def _weights(settings: Mapping[str, Any]) -> dict[str, str]:
    weights = settings.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"'weights' must have the scheme of each convolution (got {str(weights)!r:.40}).")
    for name, scheme in weights.items():
        if not isinstance(scheme, str) or scheme not in WEIGHT_SCHEMES:
            known = ", ".join(WEIGHT_SCHEMES)
            raise UsageError(f"the scheme of {name!r:.80} must be one of {known} (got {scheme!r:.40}).")
    return dict(weights)


def _calibration(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get("calibration")
    if found is not None and not isinstance(found, Mapping):
        raise UsageError(f"'calibration' must be an object with source, images, sha256 (got {found!r:.40}).")
    return dict(found or {})


def _decoder(settings: Mapping[str, Any]) -> DecoderScheme | None:
    saved = settings.get("decoder")
    if saved is None:
        return None
    if not isinstance(saved, Mapping) or not DECODER_FIELDS.keys() >= saved.keys():
        known = ", ".join(sorted(DECODER_FIELDS))
        raise UsageError(f"'decoder' must be an object with {known} (got {str(saved)!r:.80}).")
    layers = saved.get("layers")
    for name, value in {**(layers if isinstance(layers, dict) else {}), **saved}.items():
        if type(value) not in DECODER_FIELDS.get(name, (int,)):
            raise UsageError(f"'decoder' has a value of a wrong type ({name} is {value!r:.80}).")
    return DecoderScheme(**saved)
