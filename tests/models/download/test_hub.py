"""Downloads through the hub's client from a local server: needed files, hashes, resuming and error messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.download.hub import download_from_hub
from fastvlm.models.errors import DownloadError, ModelReferenceError, OutputError
from fastvlm.models.references import TINY_FOLDER, open_checkpoint

HUB_ID = "someone/FastVLM-tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    folder = tmp_path / "cache"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if hasattr(huggingface_hub.constants, name):
            monkeypatch.setattr(huggingface_hub.constants, name, str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return folder


@pytest.fixture
def files(serve_repository: Callable[..., None]) -> dict[str, bytes]:
    """The files of `tiny`."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    files = {name: (TINY_FOLDER / name).read_bytes() for name in names}
    serve_repository(HUB_ID, {**files, "llava_qwen.py": b"code", "onnx/model.onnx": b"x", "pytorch_model.bin": b"p"})
    return files


def test_needed_files_are_downloaded_to_a_folder(
    server: Any, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    stages: list[str] = []
    folder = download_from_hub(HUB_ID, tmp_path / "to" / "model", endpoint=server.url, on_stage=stages.append)
    record = json.loads((folder / "fastvlm-download.json").read_text())
    assert record == {"hub_id": HUB_ID, "commit": "c" * 40}
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {**files, "fastvlm-download.json": found["fastvlm-download.json"]}
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["model"]
    assert FolderCheckpoint(folder).layout == "Apple LLaVA"
    assert f"fetch {len(files)} files" in stages[1]


def test_complete_folder_is_not_downloaded_again(
    server: Any, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    """For example after a Ctrl-C during the last rename."""
    download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    server.asked.clear()
    stages: list[str] = []
    assert download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url, on_stage=stages.append).is_dir()
    assert not any("/resolve/" in path for path, _ in server.asked)
    assert stages[-1].endswith("already has this revision")
    (tmp_path / "model" / "fastvlm-download.json").write_text('{"hub_id": "another/model"}')
    with pytest.raises(OutputError, match="is not empty"):
        download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)


def test_only_missing_files_are_downloaded_again(
    server: Any, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    (folder / "model.safetensors").unlink()
    (folder / "mine.txt").write_text("mine")
    server.asked.clear()
    stages: list[str] = []
    download_from_hub(HUB_ID, folder, endpoint=server.url, on_stage=stages.append)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert (folder / "mine.txt").read_text() == "mine"
    assert {path.rpartition("/")[2] for path, _ in server.asked if "/resolve/" in path} == {"model.safetensors"}
    assert stages[1].startswith("fetch 1 files")
    assert [path.name for path in tmp_path.iterdir() if path != cache] == ["model"]


def test_file_of_another_size_is_reported_and_kept(
    server: Any, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"config.json: is not the downloaded file of .* bytes\. Move it away and run"
    ):
        download_from_hub(HUB_ID, folder, endpoint=server.url)
    assert (folder / "config.json").read_text() == "{}"


def test_unreachable_hub_is_reported_like_apples_server(cache: Path, tmp_path: Path) -> None:
    """Nothing was received that could be resumed."""
    with pytest.raises(DownloadError, match=r"the hub cannot be reached \(.+\)\. Check the connection and try again"):
        download_from_hub(HUB_ID, tmp_path / "model", endpoint="http://127.0.0.1:9")
    assert not (tmp_path / "model").exists()


def test_hub_id_opens_once_it_is_cached(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ModelReferenceError, match=f"`fastvlm download {HUB_ID}`"):
        open_checkpoint(HUB_ID)
    folder = download_from_hub(HUB_ID, endpoint=server.url)
    assert folder.is_relative_to(cache)
    checkpoint = open_checkpoint(HUB_ID)
    assert isinstance(checkpoint, FolderCheckpoint)
    assert checkpoint.name == "FastVLM-tiny"


def test_only_cached_revision_is_opened(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    download_from_hub(HUB_ID, revision="c" * 40, endpoint=server.url)
    assert open_checkpoint(HUB_ID).name == "FastVLM-tiny"


def test_branch_is_in_the_cache_once_it_is_complete(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    """Until then an earlier revision is opened."""
    refs = cache / f"models--{HUB_ID.replace('/', '--')}" / "refs"
    path = f"/{HUB_ID}/resolve/{'c' * 40}/model.safetensors"
    good = server.files[path]
    server.files[path] = bytes(len(good))
    with pytest.raises(DownloadError, match="has another sha256"):
        download_from_hub(HUB_ID, endpoint=server.url)
    assert not refs.exists()
    server.files[path] = good
    download_from_hub(HUB_ID, endpoint=server.url)
    assert {file.name: file.read_text() for file in refs.iterdir()} == {"main": "c" * 40}
    download_from_hub(HUB_ID, revision="c" * 40, endpoint=server.url)
    assert [file.name for file in refs.iterdir()] == ["main"]


def test_commit_of_a_branch_is_requested_once(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    """A branch that moves during a download does not mix the files of two commits."""
    assert download_from_hub(HUB_ID, endpoint=server.url).name == "c" * 40
    assert [path for path, _ in server.asked if path.startswith("/api/")] == [f"/api/models/{HUB_ID}"]
    assert {path.split("/")[4] for path, _ in server.asked if "/resolve/" in path} == {"c" * 40}


@pytest.mark.slow
def test_ctrl_c_ends_a_download_and_complete_files_stay(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    """The whole file would take minutes."""
    path = f"/{HUB_ID}/resolve/{'c' * 40}/model.safetensors"
    server.bytes_per_second = 50_000
    command = [sys.executable, "-m", "fastvlm.cli.main", "download", HUB_ID]
    own = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.PIPE, text=True) as process:
        try:
            while [asked for asked, _ in server.asked].count(path) < 2 and process.poll() is None:  # HEAD, then GET
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted")
    assert not list(cache.rglob("*/blobs/*.incomplete"))
    server.asked.clear()
    server.bytes_per_second = None
    download_from_hub(HUB_ID, endpoint=server.url)
    assert not any(asked.endswith("/config.json") for asked, _ in server.asked)
    assert open_checkpoint(HUB_ID).name == "FastVLM-tiny"


def test_incomplete_cached_checkpoint_names_the_command(server: Any, cache: Path, files: dict[str, bytes]) -> None:
    folder = download_from_hub(HUB_ID, endpoint=server.url)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match=rf"no \*.safetensors.*run `fastvlm download {HUB_ID}`"):
        open_checkpoint(HUB_ID)


def test_file_with_another_hash_is_removed(server: Any, cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    path = f"/{HUB_ID}/resolve/{'c' * 40}/model.safetensors"
    good = server.files[path]
    server.files[path] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DownloadError, match=r"model.safetensors: has another sha256 than on the hub.*was removed"):
        download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    assert not (tmp_path / "model").exists()
    server.files[path] = good
    download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == good


def test_hub_error_is_one_message(server: Any, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="nobody/nothing"):
        download_from_hub("nobody/nothing", endpoint=server.url)
    with pytest.raises(DownloadError, match="cannot be reached"):
        download_from_hub(HUB_ID, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Please log in</html>",
        b"\x80",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"id": "x", "sha": null, "siblings": 3}',
        b'{"id": "x", "sha": "/dev/zero", "siblings": []}',
        b'{"id": "x", "sha": "../../x", "siblings": []}',
        b'{"id": "x", "sha": "COMMIT", "siblings": [{"rfilename": "config.json", "size": "2"}]}',
        b'{"id": "x", "sha": "COMMIT", "siblings": [{"rfilename": 5, "size": 2}]}',
        b'{"id": "x", "sha": "COMMIT", "siblings": [{"rfilename": "config.json", "size": 2, "lfs": {"sha256": 3}}]}',
    ],
)
def test_malformed_answer_is_refused(server: Any, cache: Path, tmp_path: Path, answer: bytes) -> None:
    """A login page's answer, or a hostile one, for which the client itself would read /dev/zero endlessly."""
    for path in (f"/api/models/{HUB_ID}", f"/api/models/{HUB_ID}/revision/main"):
        server.files[path] = answer.replace(b"COMMIT", b"c" * 40)
    with pytest.raises(DownloadError, match=r"answer is malformed .*Check the connection and HF_ENDPOINT"):
        download_from_hub(HUB_ID, tmp_path / "model", endpoint=server.url)
    assert list(tmp_path.iterdir()) == []


def test_offline_mode_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download_from_hub(HUB_ID)


def test_repository_without_a_checkpoint_is_refused(
    server: Any, cache: Path, serve_repository: Callable[..., None]
) -> None:
    serve_repository(HUB_ID, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(DownloadError, match=r"must have a checkpoint .*, got config.json"):
        download_from_hub(HUB_ID, endpoint=server.url)
