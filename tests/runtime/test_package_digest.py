"""Digests of packages: of content alone, and remembered only while nothing can have changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import PackageError
from fastvlm.runtime import package_digest as module
from fastvlm.runtime.package_digest import package_digest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "fastvithd.mlpackage"
    (folder / "Data").mkdir(parents=True)
    (folder / "Manifest.json").write_text("{}")
    (folder / "Data" / "weight.bin").write_bytes(b"\1\2\3")
    return folder


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are remembered, of files that have just been written too."""
    monkeypatch.setattr(module, "SETTLED_SECONDS", -3600.0)
    return tmp_path / "records"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packages that were read."""
    found: list[Path] = []
    content_digest = module._content_digest
    monkeypatch.setattr(module, "_content_digest", lambda package: (found.append(package), content_digest(package))[1])
    return found


def test_files_of_the_finder_do_not_count(package: Path) -> None:
    before = package_digest(package, "1")
    (package / ".DS_Store").write_bytes(b"\0")
    (package / "Data" / "._weight.bin").write_bytes(b"\0")
    (package / ".hidden").mkdir()
    (package / ".hidden" / "file").touch()
    assert package_digest(package, "1") == before
    (package / "Data" / "DS_Store").touch()
    assert package_digest(package, "1") != before


@pytest.mark.parametrize("hidden", [False, True])
def test_package_error_when_a_package_has_no_files(tmp_path: Path, hidden: bool) -> None:
    if hidden:
        (tmp_path / "empty.mlpackage").mkdir()
        (tmp_path / "empty.mlpackage" / ".DS_Store").touch()
    with pytest.raises(PackageError, match="is not a package: it has no files"):
        package_digest(tmp_path / "empty.mlpackage", "1")


def test_unchanged_package_is_read_once(package: Path, records: Path, hashed: list[Path]) -> None:
    first = package_digest(package, "1", records)
    assert package_digest(package, "1", records) == first == package_digest(package, "1")
    assert package_digest(package, "2", records) == package_digest(package, "2") != first
    assert len(hashed) == 3  # once with records, twice without


def same_size_and_times(package: Path) -> None:
    file = package / "Data" / "weight.bin"
    found = file.stat()
    while file.stat().st_ctime_ns == found.st_ctime_ns:  # a tick of the clock is some milliseconds
        file.write_bytes(b"\1\2\4")
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(package: Path) -> None:
    other = package / "Data" / "other"
    other.write_bytes(b"\1\2\4")
    other.rename(package / "Data" / "weight.bin")


@pytest.mark.parametrize(
    "change", [same_size_and_times, replaced, lambda p: (p / "extra").touch(), lambda p: (p / "Manifest.json").unlink()]
)
def test_changed_package_is_read_again(package: Path, records: Path, change: Callable[[Path], object]) -> None:
    before = package_digest(package, "1", records)
    change(package)
    found = package_digest(package, "1", records)
    assert found == package_digest(package, "1") != before


def test_other_package_at_the_same_path_is_read(package: Path, records: Path) -> None:
    before = package_digest(package, "1", records)
    copy = shutil.copytree(package, package.with_name("copy"))
    same_size_and_times(copy)
    shutil.rmtree(package)
    copy.rename(package)
    assert package_digest(package, "1", records) == package_digest(package, "1") != before


def test_package_that_has_just_changed_is_not_remembered(package: Path, tmp_path: Path, hashed: list[Path]) -> None:
    for _ in range(2):
        package_digest(package, "1", tmp_path / "records")
    assert len(hashed) == 2
    assert not (tmp_path / "records").exists()


def test_package_that_changes_while_it_is_read_is_not_remembered(
    package: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content_digest = module._content_digest

    def overtaken(package: Path) -> str:
        found = content_digest(package)
        same_size_and_times(package)
        return found

    monkeypatch.setattr(module, "_content_digest", overtaken)
    package_digest(package, "1", records)
    monkeypatch.setattr(module, "_content_digest", content_digest)
    assert package_digest(package, "1", records) == package_digest(package, "1")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": [], "content": 3}', "\0"])
def test_damaged_record_is_replaced(package: Path, records: Path, content: str, hashed: list[Path]) -> None:
    package_digest(package, "1", records)
    (record,) = records.iterdir()
    record.write_text(content)
    for _ in range(2):
        assert package_digest(package, "1", records)
    assert len(hashed) == 2


def test_records_are_bounded(package: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    for n in range(4):
        package_digest(shutil.copytree(package, package.with_name(f"p{n}")), "1", records)
    assert len(list(records.iterdir())) == 2


def test_digest_is_found_when_records_cannot_be_written(package: Path, records: Path) -> None:
    records.touch()
    assert package_digest(package, "1", records) == package_digest(package, "1")
