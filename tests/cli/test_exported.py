"""A MODEL as a folder: an exported one as it is, any other exported for the time of a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm.cli.exported import exported
from fastvlm.cli.progress import StageProgress
from fastvlm.models.errors import FastVLMError


def test_exported_folder_is_used_as_it_is(model: Path) -> None:
    with StageProgress() as progress, exported(str(model), progress) as folder:
        assert folder == model
    assert model.is_dir()


def test_checkpoint_is_exported_and_removed_again() -> None:
    with StageProgress() as progress, exported("random:tiny", progress) as folder:
        assert (folder / "fastvlm.json").is_file()
    assert not folder.exists()


def test_unknown_model_is_an_error_before_any_export(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with StageProgress() as progress, pytest.raises(FastVLMError, match="nowhere"), exported(nowhere, progress):
        raise AssertionError
