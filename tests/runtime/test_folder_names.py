"""Names given for a model folder that are none: the error says the way to one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm.models.errors import ModelFolderError
from fastvlm.runtime.folder import open_folder


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tiny", "first `fastvlm export tiny -o model`"),
        ("random:0.5b", "first `fastvlm export random:0.5b -o model`"),
        ("nobody/FastVLM-0.5B", "fetch it with `fastvlm download nobody/FastVLM-0.5B`"),
        ("0.5b-stage3", "fetch it with `fastvlm download 0.5b-stage3`"),
        ("gone", "what `fastvlm export` writes"),
    ],
)
def test_error_says_how_to_get_a_folder(name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError) as told:
        open_folder(name)
    assert hint in str(told.value)
