"""The description of a Core AI asset: sizes from its files, and its program from Apple's packages where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.folder_layout import ASSET_NAME, ASSET_SYSTEMS, PACKAGE_NAME, folder_bytes
from .coreai import INSTALL, has_coreai
from .coreai_asset import read_metadata, summary

SUFFIX = ".aimodel"


@dataclass(frozen=True)
class AssetReport:
    """The description of an asset."""

    path: Path
    nbytes: int
    metadata: Mapping[str, Any]
    """Who wrote it, from `metadata.json`."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The type and shape of each input as Apple's packages write them, by name. Empty without the packages."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, int] = field(default_factory=dict)
    """The number of operations by kind, with those inside of others."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """The count of stored numbers by type."""
    unread: str = ""
    """The reason why the program was not read."""

    @property
    def systems(self) -> str:
        """The systems that load it."""
        return ASSET_SYSTEMS

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""
        return {
            "path": str(self.path),
            "experimental": True,
            "systems": self.systems,
            "bytes": self.nbytes,
            "metadata": dict(self.metadata),
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
            "operations": dict(self.operations),
            "numbers": dict(self.numbers),
            **({"unread": self.unread} if self.unread else {}),
        }


def asset_of(path: Path) -> Path | None:
    """Returns the asset that `path` is or has, or None."""
    if path.suffix == SUFFIX:
        return path
    return path / ASSET_NAME if (path / ASSET_NAME).is_dir() else None


def is_only_asset(path: Path) -> bool:
    """Returns True if `path` is an asset, or a folder with an asset and no package."""
    return asset_of(path) is not None and not (path / PACKAGE_NAME).is_dir()


def inspect_asset(asset: Path) -> AssetReport:
    """Returns the report of an asset.

    Raises:
        PackageError: it is not an asset, or Apple's packages cannot read it.
    """
    metadata, nbytes = read_metadata(asset), folder_bytes(asset)
    if not has_coreai():
        return AssetReport(asset, nbytes, metadata, unread=f"Apple's packages are missing. Run `{INSTALL}`")
    found = summary(asset)
    return AssetReport(
        asset, nbytes, metadata, found["inputs"], found["outputs"], found["operations"], found["numbers"]
    )
