"""Archives from elsewhere: what comes out, and the hostile ones."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.download.archives import is_needed
from fastvlm.models.download.unpack import unpack
from fastvlm.models.errors import DownloadError

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


def test_only_needed_files_come_out_without_their_shared_folder(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    names = unpack(write_zip(GOOD), tmp_path / "out", is_needed)
    kept = {"config.json", "model.safetensors", "fastvithd.mlpackage/Data/weights/weight.bin", "LICENSE_MODEL"}
    assert set(names) == unpacked(tmp_path / "out") == kept
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == GOOD["model/model.safetensors"]


def test_archive_without_a_shared_folder_is_taken_as_it_is(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    files = {name.removeprefix("model/"): content for name, content in GOOD.items()}
    assert "config.json" in unpack(write_zip(files), tmp_path / "out", is_needed)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("/etc/config.json", "no plain relative path"),
        ("C:/config.json", "no plain relative path"),
        ("model\\..\\config.json", "no plain relative path"),
        ("../config.json", "leads out of its folder"),
        ("model/../../config.json", "leads out of its folder"),
        (link("model/config.json"), "is a link"),
        ("model/CONFIG.json", "comes twice"),
        ("../../unneeded.py", "leads out of its folder"),
    ],
)
def test_hostile_members_stop_everything(
    write_zip: Callable[..., Path], tmp_path: Path, member: str | zipfile.ZipInfo, message: str
) -> None:
    first = {} if isinstance(member, zipfile.ZipInfo) else {"model/config.json": b"{}"}
    archive = write_zip({**first, member: b"../../target"})
    with pytest.raises(DownloadError, match=message):
        unpack(archive, tmp_path / "out", is_needed)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"archive.zip"}


def test_bombs_are_not_unpacked(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    archive = write_zip({"config.json": b"{}", "model.safetensors": bytes(40 * 2**20)})
    with pytest.raises(DownloadError, match=r"would become 41,943,042: that is no checkpoint"):
        unpack(archive, tmp_path / "out", is_needed)
    assert not (tmp_path / "out").exists()


def test_crowds_of_files_are_not_unpacked(write_zip: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the archive holds 10001 files"):
        unpack(write_zip({f"{i}.json": b"" for i in range(10_001)}), tmp_path / "out", is_needed)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "no zip", "smaller size", "encrypted"])
def test_damaged_archives_are_told(write_zip: Callable[..., Path], tmp_path: Path, fault: str) -> None:
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


@pytest.mark.parametrize(
    "name", ["fastvithd.mlpackage/../../config.json", "onnx/config.json", "model.bin", ".config.json", "run.py"]
)
def test_files_that_nobody_asked_for_are_not_needed(name: str) -> None:
    assert not is_needed(name)
