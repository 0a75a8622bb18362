"""Recipes: what an export decided, read again so that another can do the same."""

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
    """What an earlier export did."""

    file: Path
    encoder: EncoderScheme
    decoder: DecoderScheme | None
    image_size: int | None
    calibration: Mapping[str, Any]
    """What the manifest says of the images that were measured on; empty where it says nothing."""
    settings: Mapping[str, Any]
    """All that the recipe says, as it was read."""


def read_recipe(path: str | Path) -> SavedRecipe:
    """The recipe in an exported folder, in its `fastvlm.json`, or in a file that holds nothing else.

    Raises:
        UsageError: it cannot be read, lacks the encoder's weights, or a value is of a wrong type or unknown.
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
        raise UsageError(f"'recipe' should be a JSON object; found {type(settings).__name__}")
    if settings.get("layout") == "mlx":
        raise UsageError(
            "an export of layout mlx, which has no recipe of an encoder; give its options again with --layout mlx"
        )


REQUIRED = object()

DECODER_FIELDS: Mapping[str, tuple[type, ...]] = {
    "bits": (int, str),
    "group_size": (int,),
    "quantize_embeddings": (bool,),
    "quantizer": (str,),
    "avg_bits": (int, float, NoneType),
    "layers": (dict,),
}
"""Of `DecoderScheme`, as JSON has them; bits of single layers are whole numbers."""


def _typed(settings: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    value = settings.get(key)
    if value is None and default is not REQUIRED:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise UsageError(f"{key!r} should be of type {kind.__name__}; found {value!r:.40}")
    return kind(value)


def _weights(settings: Mapping[str, Any]) -> dict[str, str]:
    weights = settings.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"'weights' should name the scheme of each convolution; found {str(weights)!r:.40}")
    for name, scheme in weights.items():
        if not isinstance(scheme, str) or scheme not in WEIGHT_SCHEMES:
            known = ", ".join(WEIGHT_SCHEMES)
            raise UsageError(f"the scheme of {name!r:.80} should be one of {known}; found {scheme!r:.40}")
    return dict(weights)


def _calibration(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get("calibration")
    if found is not None and not isinstance(found, Mapping):
        raise UsageError(f"'calibration' should be an object with source, images, sha256; found {found!r:.40}")
    return dict(found or {})


def _decoder(settings: Mapping[str, Any]) -> DecoderScheme | None:
    saved = settings.get("decoder")
    if saved is None:
        return None
    if not isinstance(saved, Mapping) or not DECODER_FIELDS.keys() >= saved.keys():
        known = ", ".join(sorted(DECODER_FIELDS))
        raise UsageError(f"'decoder' should be an object with {known}; found {str(saved)!r:.80}")
    layers = saved.get("layers")
    for name, value in {**(layers if isinstance(layers, dict) else {}), **saved}.items():
        if type(value) not in DECODER_FIELDS.get(name, (int,)):
            raise UsageError(f"'decoder' holds a value of a wrong type: {name} is {value!r:.80}")
    return DecoderScheme(**saved)
