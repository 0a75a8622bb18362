"""Resumable downloads over HTTP: interruptions resume, changed files restart, wrong answers are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.download.http_file import fetch
from fastvlm.models.errors import DownloadError, OutputError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 3_000_000


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
