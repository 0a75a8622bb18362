"""The scheme of the encoder's weights: one for all, a search, or a saved plan."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..models.errors import UsageError
from .schemes import check_scheme

MIXED = "mixed"
DEFAULT_SCHEME = "int8"
DEFAULT_MIN_SNR_DB = 40.0
MIN_SNR_RANGE_DB = (5.0, 55.0)
"""The range of `min_snr` in dB. float16 alone reaches about 58 dB."""

BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

MAX_LISTED = 4
"""The most names in an error."""


@dataclass(frozen=True)
class EncoderScheme:
    """The storage of the encoder's weights.

    Raises:
        UsageError: an argument has an unknown value, or arguments exclude each other.
    """

    quant: str = DEFAULT_SCHEME
    min_snr: float | None = None
    """The SNR of `image_features` in dB that `mixed` keeps."""
    max_bytes: int | None = None
    """The most bytes of the package's weights with `mixed`."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """The plan: the scheme of every convolution by its name in the rewritten network. Empty before the choice."""
    file: str = field(default="", compare=False)
    """The file of the plan, for messages."""

    def __post_init__(self) -> None:
        check_scheme(self.quant)
        if self.quant != MIXED and (self.min_snr is not None or self.max_bytes is not None):
            raise UsageError(
                f"min_snr and max_bytes need quant={MIXED!r} (got {self.quant!r}).", "min_snr", "max_bytes", "quant"
            )
        if self.min_snr is not None and self.max_bytes is not None:
            raise UsageError("min_snr and max_bytes exclude each other. Pass one of them.", "min_snr", "max_bytes")
        least, most = MIN_SNR_RANGE_DB
        if self.min_snr is not None and not least <= self.min_snr <= most:
            raise UsageError(f"min_snr must be between {least:g} and {most:g} dB (got {self.min_snr:g}).", "min_snr")

    def check_names(self, names: Collection[str]) -> None:
        """Raises UsageError unless the plan has exactly the convolutions `names`."""
        for what, found in (("unknown", self.weights.keys() - names), ("missing", set(names) - self.weights.keys())):
            if found:
                listed = ", ".join(sorted(found)[:MAX_LISTED])
                raise UsageError(
                    f"{self.file}: the recipe is for another encoder ({len(found)} {what} convolutions, such as "
                    f"{listed}). Pass a recipe for this one."
                )

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entry. `min_snr` and `max_bytes` are left out if they are None."""
        values = asdict(self)
        del values["file"]
        return {key: value for key, value in values.items() if value is not None}


def encoder_scheme(
    quant: str | None, min_snr: float | None = None, max_bytes: str | int | None = None
) -> EncoderScheme:
    """Returns the scheme for the arguments of an export. Raises UsageError if they are invalid."""
    quant = DEFAULT_SCHEME if quant is None else quant
    size = None if max_bytes is None else parsed_bytes(max_bytes)
    if quant == MIXED and min_snr is None and size is None:
        min_snr = DEFAULT_MIN_SNR_DB
    return EncoderScheme(quant, min_snr, size)


def parsed_bytes(text: str | int) -> int:
    """Returns the bytes of `80M`, `80MB`, `1.5G`, `500k` or a number. Units are decimal. Raises UsageError."""
    match = BYTES.fullmatch(str(text).strip())
    if not match:
        raise UsageError(f"max_bytes must be a number of bytes, such as 80M (got {str(text)!r:.40}).", "max_bytes")
    return int(float(match[1]) * UNITS[match[2].lower()])
