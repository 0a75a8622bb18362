"""The cache of the Hugging Face hub's client."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from fastvlm.models.hub_cache import cached_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def add_revision(cache: Path, revision: str) -> Path:
    folder = cache / "models--owner--model" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_only_revision_is_found(cache: Path) -> None:
    assert cached_folder("owner/model") is None
    folder = add_revision(cache, "a" * 40)
    assert cached_folder("owner/model") == folder


def test_main_branch_is_preferred_and_two_others_are_refused(cache: Path) -> None:
    add_revision(cache, "a" * 40)
    main = add_revision(cache, "b" * 40)
    assert cached_folder("owner/model") is None
    refs = cache / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    assert cached_folder("owner/model") == main


@pytest.mark.parametrize("hub_id", ["model", "../owner/model", "owner/model/more"])
def test_other_strings_are_never_looked_up(cache: Path, hub_id: str) -> None:
    assert cached_folder(hub_id) is None
