"""Apple's archives by name: a folder that is whole or not there, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.download.apple import download_archive, work_folder
from fastvlm.models.download.archives import FOLDERS, archive_url
from fastvlm.models.errors import DownloadError, OutputError
from fastvlm.models.references import TINY_FOLDER

NAME = "0.5b-stage3"


@pytest.fixture
def served(server: Any) -> str:
    """The address of `tiny` as Apple packs a checkpoint."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in TINY_FOLDER.iterdir():
            archive.write(file, f"llava-fastvithd_0.5b_stage3/{file.name}")
        archive.writestr("llava-fastvithd_0.5b_stage3/training_args.bin", b"pickle")
    server.files["/a.zip"] = packed.getvalue()
    return f"{server.url}/a.zip"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_archive_becomes_a_checkpoint(served: str, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    record = download_archive(NAME, destination, url=served)
    checkpoint = FolderCheckpoint(destination)
    assert checkpoint.layout == "Apple LLaVA"
    assert not (destination / "training_args.bin").exists()
    assert json.loads((destination / "fastvlm-download.json").read_text()) == record
    assert not record["sha256_was_known"]
    assert names(tmp_path / "out") == {"model"}
    assert download_archive(NAME, destination, url="http://127.0.0.1:9/") == {"already_there": True}


def test_files_that_are_gone_are_fetched_again(server: Any, served: str, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    download_archive(NAME, destination, url=served)
    whole = {path.name: path.read_bytes() for path in destination.iterdir()}
    (destination / "model.safetensors").unlink()
    (destination / "mine.txt").write_text("mine")
    server.asked.clear()
    record = download_archive(NAME, destination, url=served)
    assert server.asked
    assert record["sha256"] == json.loads(whole["fastvlm-download.json"])["sha256"]
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == {**whole, "mine.txt": b"mine"}
    assert names(tmp_path / "out") == {"model"}
    assert download_archive(NAME, destination, url="http://127.0.0.1:9/") == {"already_there": True}


def test_files_of_another_archive_are_not_mixed_in(server: Any, served: str, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    download_archive(NAME, destination, url=served)
    (destination / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="is not empty: remove it"):
        download_archive(NAME, destination, url=served, sha256="0" * 64)
    server.add_archive("/a.zip", "a", {"config.json": b"{}", "model.safetensors": b"another"})
    with pytest.raises(DownloadError, match="it should be"):
        download_archive(NAME, destination, url=served)
    assert not (destination / "model.safetensors").exists()


def test_file_of_another_size_is_told_and_stays(served: str, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    download_archive(NAME, destination, url=served)
    (destination / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config.json is not the file of .* bytes .*: move it away and run the same"):
        download_archive(NAME, destination, url=served)
    assert (destination / "config.json").read_text() == "{}"


@pytest.mark.parametrize("sizes", [None, 3, {}, {"config.json": "2"}])
def test_record_without_sizes_is_none_of_a_whole_folder(served: str, tmp_path: Path, sizes: object) -> None:
    destination = tmp_path / "model"
    record = download_archive(NAME, destination, url=served)
    (destination / "fastvlm-download.json").write_text(json.dumps({**record, "sizes": sizes}))
    with pytest.raises(OutputError, match="is not empty: remove it"):
        download_archive(NAME, destination, url=served)


def test_interrupted_archive_goes_on_and_never_looks_whole(server: Any, served: str, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    server.cut_after = 2_000_000
    with pytest.raises(DownloadError, match="cut off"):
        download_archive(NAME, destination, url=served)
    assert names(tmp_path / "out") == {".model.download"}
    download_archive(NAME, destination, url=served)
    assert server.asked[-1] == ("/a.zip", "bytes=2000000-")
    FolderCheckpoint(destination)
    assert names(tmp_path / "out") == {"model"}


def test_attempt_that_got_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be reached"):
        download_archive(NAME, tmp_path / "model", url="http://127.0.0.1:9/a.zip")
    assert names(tmp_path) == set()


def test_damaged_archive_is_removed_so_that_the_next_attempt_is_new(server: Any, served: str, tmp_path: Path) -> None:
    good = server.files["/a.zip"]
    server.files["/a.zip"] = good[:1_000_000] + bytes([good[1_000_000] ^ 1]) + good[1_000_001:]
    with pytest.raises(DownloadError, match="not a whole zip archive"):
        download_archive(NAME, tmp_path / "model", url=served)
    assert not (tmp_path / "model").exists()
    server.files["/a.zip"] = good
    download_archive(NAME, tmp_path / "model", url=served)
    FolderCheckpoint(tmp_path / "model")


def test_archive_that_was_fetched_but_not_unpacked_is_not_fetched_again(
    server: Any, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fastvlm.models.download.apple.unpack", stop)
        download_archive(NAME, tmp_path / "model", url=served)
    asked = len(server.asked)
    download_archive(NAME, tmp_path / "model", url=served)
    assert len(server.asked) == asked
    FolderCheckpoint(tmp_path / "model")


def test_archive_without_weights_is_refused(server: Any, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/config.json", "{}")
        archive.writestr("a/pytorch_model.bin", "pickle")
    server.files["/a.zip"] = packed.getvalue()
    with pytest.raises(DownloadError, match=r"holds no checkpoint .*; found config.json"):
        download_archive(NAME, tmp_path / "model", url=f"{server.url}/a.zip")
    assert not (tmp_path / "model").exists()


def test_what_is_in_the_way_is_never_touched(served: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        download_archive(NAME, tmp_path / "model", url=served)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OutputError, match="is no folder"):
        download_archive(NAME, tmp_path / "link", url=served)
    assert names(tmp_path / "model") == {"mine.txt"}


def test_two_downloads_to_one_place_do_not_mix(served: str, tmp_path: Path) -> None:
    with work_folder(tmp_path / "model"), pytest.raises(OutputError, match="another process is downloading"):
        download_archive(NAME, tmp_path / "model", url=served)


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
def test_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The other process ends between our opening the file and our locking it."""
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


def test_folder_that_goes_before_the_lock_is_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(OutputError, match="another process is downloading"), work_folder(tmp_path / "model"):
        pass


def test_place_that_another_download_took_meanwhile_is_not_downloaded_to(
    server: Any, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def late(destination: Path) -> Iterator[Path]:
        (destination / "theirs").mkdir(parents=True)
        with work_folder(destination) as work:
            yield work

    monkeypatch.setattr("fastvlm.models.download.apple.work_folder", late)
    with pytest.raises(OutputError, match="is not empty"):
        download_archive(NAME, tmp_path / "model", url=served)
    assert server.asked == []


def test_addresses_are_apples() -> None:
    base = "https://ml-site.cdn-apple.com/datasets/fastvlm/llava-fastvithd"
    assert archive_url("0.5b-stage3") == f"{base}_0.5b_stage3.zip"
    assert archive_url("7b-stage2") == f"{base}_7b_stage2.zip"
    assert archive_url("1.5b-stage3-int8") == f"{base}_1.5b_stage3_llm.int8.zip"
    assert len(FOLDERS) == 9
