"""Apple's archives: the folder is complete or absent, interruptions resume, and hostile archives are refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.download.apple import download_archive, fetch, unpack, work_folder
from fastvlm.models.download.archives import is_needed
from fastvlm.models.errors import DownloadError, OutputError
from fastvlm.models.references import TINY_FOLDER

NAME = "0.5b-stage3"

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 3_000_000


@pytest.fixture
def served(server: Any) -> str:
    """The URL of `tiny`, packed like one of Apple's checkpoints."""
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


def test_missing_files_are_downloaded_again(server: Any, served: str, tmp_path: Path) -> None:
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
    with pytest.raises(OutputError, match="is not empty. Remove it"):
        download_archive(NAME, destination, url=served, sha256="0" * 64)
    server.add_archive("/a.zip", "a", {"config.json": b"{}", "model.safetensors": b"another"})
    with pytest.raises(DownloadError, match="sha256 must be"):
        download_archive(NAME, destination, url=served)
    assert not (destination / "model.safetensors").exists()


def test_file_of_another_size_is_reported_and_kept(served: str, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    download_archive(NAME, destination, url=served)
    (destination / "config.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"config.json: is not the downloaded file of .* bytes\. Move it away and run"
    ):
        download_archive(NAME, destination, url=served)
    assert (destination / "config.json").read_text() == "{}"


@pytest.mark.parametrize("sizes", [None, 3, {}, {"config.json": "2"}])
def test_record_without_sizes_is_not_of_a_complete_folder(served: str, tmp_path: Path, sizes: object) -> None:
    destination = tmp_path / "model"
    record = download_archive(NAME, destination, url=served)
    (destination / "fastvlm-download.json").write_text(json.dumps({**record, "sizes": sizes}))
    with pytest.raises(OutputError, match="is not empty. Remove it"):
        download_archive(NAME, destination, url=served)


def test_interrupted_archive_resumes_and_never_looks_complete(server: Any, served: str, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    server.cut_after = 2_000_000
    with pytest.raises(DownloadError, match="interrupted after"):
        download_archive(NAME, destination, url=served)
    assert names(tmp_path / "out") == {".model.download"}
    download_archive(NAME, destination, url=served)
    assert server.asked[-1] == ("/a.zip", "bytes=2000000-")
    FolderCheckpoint(destination)
    assert names(tmp_path / "out") == {"model"}


def test_attempt_without_any_bytes_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be reached"):
        download_archive(NAME, tmp_path / "model", url="http://127.0.0.1:9/a.zip")
    assert names(tmp_path) == set()


def test_damaged_archive_is_removed_before_the_next_attempt(server: Any, served: str, tmp_path: Path) -> None:
    good = server.files["/a.zip"]
    server.files["/a.zip"] = good[:1_000_000] + bytes([good[1_000_000] ^ 1]) + good[1_000_001:]
    with pytest.raises(DownloadError, match="not a complete zip archive"):
        download_archive(NAME, tmp_path / "model", url=served)
    assert not (tmp_path / "model").exists()
    server.files["/a.zip"] = good
    download_archive(NAME, tmp_path / "model", url=served)
    FolderCheckpoint(tmp_path / "model")


def test_complete_archive_is_not_downloaded_again_to_unpack(
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
    with pytest.raises(DownloadError, match=r"must have a checkpoint .*, got config.json"):
        download_archive(NAME, tmp_path / "model", url=f"{server.url}/a.zip")
    assert not (tmp_path / "model").exists()


def test_existing_files_are_never_touched(served: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        download_archive(NAME, tmp_path / "model", url=served)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OutputError, match="is not a folder"):
        download_archive(NAME, tmp_path / "link", url=served)
    assert names(tmp_path / "model") == {"mine.txt"}


def test_second_download_to_a_folder_is_refused(served: str, tmp_path: Path) -> None:
    with work_folder(tmp_path / "model"), pytest.raises(OutputError, match="another process is downloading"):
        download_archive(NAME, tmp_path / "model", url=served)


def test_folder_filled_before_the_lock_is_not_downloaded_to(
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


GOOD = {
    "model/config.json": b"{}",
    "model/model.safetensors": b"weights" * 1000,
    "model/training_args.bin": b"pickle",
    "model/trainer_state.json": b"{}",
    "model/llava_qwen.py": b"code",
    "model/fastvithd.mlpackage/Data/weights/weight.bin": b"bin",
    "model/LICENSE_MODEL": b"licence",
    "model/onnx/config.json": b"{}",
    "__MACOSX/model/._config.json": b"finder",
}


@pytest.fixture
def write_zip(tmp_path: Path) -> Callable[..., Path]:
    def write(files: dict[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
        with zipfile.ZipFile(tmp_path / "archive.zip", "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return tmp_path / "archive.zip"

    return write


def unpacked(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_needed_files_are_unpacked_without_common_folder(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    names = unpack(write_zip(GOOD), tmp_path / "out", is_needed)
    kept = {"config.json", "model.safetensors", "fastvithd.mlpackage/Data/weights/weight.bin", "LICENSE_MODEL"}
    assert set(names) == unpacked(tmp_path / "out") == kept
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == GOOD["model/model.safetensors"]


def test_archive_without_a_common_folder_is_unpacked_as_is(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    files = {name.removeprefix("model/"): content for name, content in GOOD.items()}
    assert "config.json" in unpack(write_zip(files), tmp_path / "out", is_needed)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("/etc/config.json", "is not a plain relative path"),
        ("C:/config.json", "is not a plain relative path"),
        ("model\\..\\config.json", "is not a plain relative path"),
        ("../config.json", "leads out of its folder"),
        ("model/../../config.json", "leads out of its folder"),
        (link("model/config.json"), "is a link"),
        ("model/CONFIG.json", "is in it twice"),
        ("../../unneeded.py", "leads out of its folder"),
    ],
)
def test_hostile_members_stop_the_unpacking(
    write_zip: Callable[..., Path], tmp_path: Path, member: str | zipfile.ZipInfo, message: str
) -> None:
    first = {} if isinstance(member, zipfile.ZipInfo) else {"model/config.json": b"{}"}
    archive = write_zip({**first, member: b"../../target"})
    with pytest.raises(DownloadError, match=message):
        unpack(archive, tmp_path / "out", is_needed)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"archive.zip"}


def test_zip_bombs_are_not_unpacked(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    archive = write_zip({"config.json": b"{}", "model.safetensors": bytes(40 * 2**20)})
    with pytest.raises(DownloadError, match=r"would unpack to 41,943,042, so it is not a checkpoint"):
        unpack(archive, tmp_path / "out", is_needed)
    assert not (tmp_path / "out").exists()


def test_too_many_files_are_not_unpacked(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="must have at most 10000 files, got 10001"):
        unpack(write_zip({f"{i}.json": b"" for i in range(10_001)}), tmp_path / "out", is_needed)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "no zip", "smaller size", "encrypted"])
def test_damaged_archives_are_refused(write_zip: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    archive = write_zip({"model.safetensors": b"weights" * 1000, "config.json": b"{}"}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    central = content.rindex(b"PK\x01\x02", 0, content.rindex(b"config.json"))
    if fault == "truncated":
        content = content[:5000]
    elif fault == "flipped":
        content[3000] ^= 1
    elif fault == "no zip":
        content = bytearray(b"<html>not found</html>")
    elif fault == "smaller size":
        content[central + 24 : central + 28] = (1).to_bytes(4, "little")
    else:
        content[central + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DownloadError):
        unpack(archive, tmp_path / "out", is_needed)


@pytest.fixture
def url(server: Any) -> str:
    server.files["/archive.zip"] = CONTENT
    return f"{server.url}/archive.zip"


def interrupt(server: Any, url: str, target: Path) -> None:
    server.cut_after = CUT
    with pytest.raises(DownloadError, match=r"interrupted after 3,000,000 of 5,120,000 bytes .*Run the command again"):
        fetch(url, target)
    assert not target.exists()
    assert target.with_name("archive.zip.part").stat().st_size == CUT


def test_complete_file_is_written_and_its_hash_returned(server: Any, url: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    digest = fetch(url, tmp_path / "archive.zip", sha256=SHA256, on_progress=lambda *counts: seen.append(counts))
    assert digest == SHA256
    assert (tmp_path / "archive.zip").read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"]


def test_interrupted_file_is_resumed(server: Any, url: str, tmp_path: Path) -> None:
    target = tmp_path / "archive.zip"
    interrupt(server, url, target)
    assert fetch(url, target) == SHA256
    assert server.asked[-1] == ("/archive.zip", f"bytes={CUT}-")
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_changed_file_is_downloaded_from_the_start(
    server: Any, url: str, tmp_path: Path, ignore_if_range: bool
) -> None:
    target = tmp_path / "archive.zip"
    interrupt(server, url, target)
    server.files["/archive.zip"] = changed = CONTENT[::-1]
    server.ignore_if_range = ignore_if_range
    assert fetch(url, target) == hashlib.sha256(changed).hexdigest()
    assert target.read_bytes() == changed


@pytest.mark.parametrize("notes", ["", "{}", '{"url": "http://elsewhere/", "size": 5120000, "validator": "x"}'])
def test_part_without_a_matching_description_is_discarded(server: Any, url: str, tmp_path: Path, notes: str) -> None:
    target = tmp_path / "archive.zip"
    interrupt(server, url, target)
    (tmp_path / "archive.zip.part.json").write_text(notes)
    if not notes:
        (tmp_path / "archive.zip.part.json").unlink()
    fetch(url, target)
    assert server.asked[-1] == ("/archive.zip", None)
    assert target.read_bytes() == CONTENT


def test_refused_range_is_followed_by_a_full_request(server: Any, url: str, tmp_path: Path) -> None:
    target = tmp_path / "archive.zip"
    interrupt(server, url, target)
    server.files["/archive.zip"] = changed = CONTENT[:1000]
    server.ignore_if_range = True
    assert fetch(url, target) == hashlib.sha256(changed).hexdigest()


def test_wrong_hash_removes_the_file(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"sha256 must be {'0' * 64}, got {SHA256}\. The file was removed"):
        fetch(url, tmp_path / "archive.zip", sha256="0" * 64)
    assert not (tmp_path / "archive.zip").exists()
    assert not (tmp_path / "archive.zip.part").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"status": 404}, "file not found"),
        ({"status": 503}, "the server answered 503"),
        ({"claimed_length": 10**15}, "invalid Content-Length"),
        ({"claimed_length": len(CONTENT) + 7}, "interrupted after 5,120,000 of 5,120,007"),
    ],
)
def test_wrong_answers_are_refused(
    server: Any, url: str, tmp_path: Path, setting: dict[str, int], message: str
) -> None:
    for name, value in setting.items():
        setattr(server, name, value)
    with pytest.raises(DownloadError, match=message):
        fetch(url, tmp_path / "archive.zip")
    assert not (tmp_path / "archive.zip").exists()


def test_unreachable_server_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/archive.zip", tmp_path / "archive.zip")


def test_disk_space_is_checked_first(server: Any, url: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not enough space"):
        fetch(url, tmp_path / "archive.zip", disk_factor=10**12)
    assert list(tmp_path.iterdir()) == []


def test_description_of_a_part_is_readable(server: Any, url: str, tmp_path: Path) -> None:
    interrupt(server, url, tmp_path / "archive.zip")
    noted = json.loads((tmp_path / "archive.zip.part.json").read_text())
    assert noted == {"url": url, "size": len(CONTENT), "validator": f'"{SHA256}"'}
