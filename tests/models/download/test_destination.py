"""The folder of a download: one process at a time."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import TextIO

import pytest

from fastvlm.models.download.apple import work_folder
from fastvlm.models.download.destination import check_free, publish
from fastvlm.models.errors import OutputError


@pytest.mark.parametrize("again", [False, True], ids=["gone", "recreated"])
def test_lock_on_a_removed_file_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The other process ends after this one opened the lock file and before it locked it."""
    lock = tmp_path / ".model.download" / "lock"

    def finish(file: TextIO, how: int) -> None:
        file_lock(file, how)
        shutil.rmtree(lock.parent)
        if again:
            lock.parent.mkdir()
            lock.touch()

    file_lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", finish)
    with pytest.raises(OutputError, match="another process is downloading"), work_folder(tmp_path / "model"):
        pass
    assert lock.exists() == again


def test_folder_removed_before_locking_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(OutputError, match="another process is downloading"), work_folder(tmp_path / "model"):
        pass


def test_folder_with_the_finders_file_counts_as_empty(tmp_path: Path) -> None:
    (destination := tmp_path / "model").mkdir()
    (destination / ".DS_Store").write_bytes(b"x")
    (work := tmp_path / "work").mkdir()
    (work / "config.json").write_text("{}")
    check_free(destination)
    publish(work, destination)
    assert [path.name for path in destination.iterdir()] == ["config.json"]
    with pytest.raises(OutputError, match="is not empty"):
        check_free(destination)
