"""Descriptions of Core AI assets, from their files alone. `test_coreai_asset` has what Apple's packages read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm.export import coreai
from fastvlm.export.inspect_asset import asset_of, inspect_asset, is_only_asset
from fastvlm.export.inspect_package import inspect
from fastvlm.models.errors import PackageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with an asset of 100 bytes."""
    asset = tmp_path / "model" / "fastvithd.aimodel"
    asset.mkdir(parents=True)
    metadata = json.dumps({"producer": "coreai-core 1.0.0b3"})
    (asset / "metadata.json").write_text(metadata)
    (asset / "main.mlirb").write_bytes(b"\0" * (100 - len(metadata)))
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_asset_is_found_in_a_folder_and_by_its_own_path(folder: Path) -> None:
    asset = folder / "fastvithd.aimodel"
    assert asset_of(folder) == asset_of(asset) == asset and asset_of(folder.parent) is None
    assert is_only_asset(folder) and is_only_asset(asset) and not is_only_asset(folder.parent)
    (folder / "fastvithd.mlpackage").mkdir()
    assert not is_only_asset(folder)


def test_files_are_described_without_apples_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreai.importlib.util, "find_spec", lambda name: None)
    found = inspect_asset(folder / "fastvithd.aimodel").as_dict()
    assert found["bytes"] == 100 and found["experimental"] is True and "macOS 27" in found["systems"]
    assert found["metadata"] == {"producer": "coreai-core 1.0.0b3"} and found["operations"] == {}
    assert 'pip install "fastvlm[coreai]"' in found["unread"]


def test_package_that_is_missing_next_to_an_asset_is_named(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"has its encoder as fastvithd\.aimodel, for Core AI, and no package"):
        inspect(folder)


def test_folder_without_a_program_is_one_line(folder: Path) -> None:
    (folder / "fastvithd.aimodel" / "main.mlirb").unlink()
    with pytest.raises(PackageError, match=r"it has no main\.mlirb"):
        inspect_asset(folder / "fastvithd.aimodel")
