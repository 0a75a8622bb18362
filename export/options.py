"""The arguments of an export, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

OnStage = Callable[[str], None]
"""A function that is called with a short description of each stage before the stage begins."""


def silent(stage: str) -> None:
    """Does nothing with the description of a stage."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The keyword arguments of `fastvlm.export`, which documents them. None leaves the choice to the recipe.

    This list is the signature of `export`. The command line declares the same names.
    """

    adapter: str | Path | None = None
    base: str | Path | None = None
    allow_pickle: bool = False
    recipe: str | Path | None = None
    calibrate: str | Path | None = None
    encoder: str = "coreml"
    format: str | None = None
    quant: str | None = None
    min_snr: float | None = None
    max_bytes: str | int | None = None
    image_size: int | None = None
    decoder_bits: int | str | None = None
    decoder_avg_bits: float | None = None
    decoder_quantizer: str | None = None
    group_size: int | None = None
    quantize_embeddings: bool | None = None
    attention_tiles: int | None = None
    io: str | None = None
    min_os: str | None = None
    with_projector: bool | None = None
    force: bool = False
    allow_lint: bool = False
    allow_shortfall: bool = False
    on_stage: OnStage = silent

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any]) -> ExportOptions:
        """Returns the options among `arguments`, whose other entries are ignored."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def given(self, *names: str) -> dict[str, Any]:
        """Returns those of the options `names` that are not None."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}
