"""Output folders: absent or whole, whatever fails, is killed or is in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm.export import atomic_folder
from fastvlm.export.atomic_folder import check_destination, new_folder
from fastvlm.models.errors import OutputError


def write(folder: Path, text: str = "new") -> None:
    (folder / "fastvlm.json").write_text(text)


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_one_line_and_leaves_no_folder(small_disk: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), new_folder(small_disk / "m", force=False) as folder:
        write(folder, "x" * 3_000_000)
    assert list(small_disk.iterdir()) == []


def test_native_writers_error_on_a_full_disk_is_recognized(small_disk: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), new_folder(small_disk / "m", force=False):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert list(small_disk.iterdir()) == []


def test_earlier_export_stays_when_the_disk_fills_up(small_disk: Path) -> None:
    with new_folder(small_disk / "m", force=False) as folder:
        write(folder, "old")
    with pytest.raises(OutputError, match="the disk is full"), new_folder(small_disk / "m", force=True) as folder:
        write(folder, "x" * 3_000_000)
    assert (small_disk / "m" / "fastvlm.json").read_text() == "old"


def test_read_only_file_system_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"cannot be written \(Read-only"), new_folder(small_disk / "m", force=False):
        pass


def test_folders_of_dead_runs_go_and_those_of_others_stay(tmp_path: Path) -> None:
    others = [f".m.partial-{os.getppid()}", ".m.partial-notes", ".m2.partial-1", "m.partial-9"]
    for name in [f".m.partial-{dead_pid()}", f".m.partial-{os.getpid()}", *others]:
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / f".m.partial-{dead_pid()}").write_text("a file of somebody's")
    with new_folder(tmp_path / "m", force=False) as folder:
        write(folder)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"m", *others}
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1


def test_run_killed_between_two_renames_is_undone(tmp_path: Path) -> None:
    replaced = tmp_path / f".m.replaced-{dead_pid()}"
    replaced.mkdir()
    write(replaced, "old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "m", force=True):
        raise ZeroDivisionError
    assert (tmp_path / "m" / "fastvlm.json").read_text() == "old"


def test_interrupt_between_two_renames_restores_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CtrlC(BaseException):
        pass

    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise CtrlC
        return rename(self, target)

    with new_folder(tmp_path / "m", force=False) as folder:
        write(folder, "old")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(CtrlC), new_folder(tmp_path / "m", force=True) as folder:
        write(folder)
    assert (tmp_path / "m" / "fastvlm.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_second_of_two_writers_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"exists\. Pass force=True"),
        new_folder(tmp_path / "m", force=False) as folder,
    ):
        write(folder)
        (tmp_path / "m").mkdir()  # another process, which was faster
        write(tmp_path / "m", "theirs")
    assert (tmp_path / "m" / "fastvlm.json").read_text() == "theirs"
    second = new_folder(tmp_path / "other", force=False)
    with new_folder(tmp_path / "other", force=False), pytest.raises(OutputError, match="written by this process"):
        second.__enter__()
    assert atomic_folder._being_written == set()


def test_folder_with_the_finders_file_counts_as_empty(tmp_path: Path) -> None:
    (destination := tmp_path / "model").mkdir()
    (destination / ".DS_Store").write_bytes(b"x")
    check_destination(destination, force=False)
    with new_folder(destination, force=False) as folder:
        (folder / "fastvlm.json").write_text("{}")
    assert [path.name for path in destination.iterdir()] == ["fastvlm.json"]
    with pytest.raises(OutputError, match="exists. Pass force=True"):
        check_destination(destination, force=False)
