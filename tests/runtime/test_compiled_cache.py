"""Compiled packages: made once, found again by content, never seen half done, and digests that are recorded."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import OutputError, PackageError
from fastvlm.runtime import compiled_cache
from fastvlm.runtime.compiled_cache import CompiledCache, package_digest, user_cache_folder


class FakeCompiler:
    """A compiler that copies the manifest, and opens copies that are whole."""

    def __init__(self, version: str = "macOS 15.1", failures: int = 0) -> None:
        self.version = version
        self.compiled: list[Path] = []
        self.failures = failures
        """The number of times that opening fails for a temporary reason."""

    def compile(self, package: Path, destination: Path) -> None:
        self.compiled.append(destination)
        assert destination.suffix == ".mlmodelc"
        assert not destination.exists()
        destination.mkdir()
        (destination / "model").write_bytes((package / "Manifest.json").read_bytes())

    def open(self, compiled: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError('{\n    NSLocalizedDescription = "The service is not there.";\n}')
        content = (compiled / "model").read_text()
        if content == "broken":
            raise RuntimeError('{\n    NSLocalizedDescription = "Core ML refuses.";\n}')
        return lambda inputs: {"content": content}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "RETRY_SECONDS", 0)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "fastvithd.mlpackage"
    (folder / "Data").mkdir(parents=True)
    (folder / "Manifest.json").write_text("{}")
    (folder / "Data" / "weight.bin").write_bytes(b"\1\2\3")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> CompiledCache:
    return CompiledCache(tmp_path / "cache" / "deep")


def test_package_is_compiled_once_when_it_is_opened_twice(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    first, second = cache.open(package, compiler), cache.open(package, compiler)
    assert (first.compiled_now, second.compiled_now) == (True, False)
    assert len(compiler.compiled) == 1
    assert first.predict({}) == second.predict({}) == {"content": "{}"}
    place = cache.place(package, compiler.version)
    assert {path.name for path in cache.folder.iterdir()} == {place.name, f"{place.stem}.used"}
    assert first.compiled == second.compiled == place


def test_copy_is_found_when_the_package_was_moved(package: Path, cache: CompiledCache, tmp_path: Path) -> None:
    compiler = FakeCompiler()
    cache.open(package, compiler)
    (tmp_path / "elsewhere").mkdir()
    moved = package.rename(tmp_path / "elsewhere" / package.name)
    assert not cache.open(moved, compiler).compiled_now


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "Data" / "weight.bin").write_bytes(b"\1\2\4"),  # the size is the same
        lambda package: (package / "Data" / "weight.bin").rename(package / "Data" / "other.bin"),
        lambda package: (package / "extra").write_bytes(b""),
    ],
)
def test_package_is_compiled_again_when_its_content_changes(
    package: Path, cache: CompiledCache, change: Callable[[Path], object]
) -> None:
    compiler = FakeCompiler()
    cache.open(package, compiler)
    change(package)
    assert cache.open(package, compiler).compiled_now


def test_package_is_compiled_again_when_the_system_was_updated(package: Path, cache: CompiledCache) -> None:
    cache.open(package, FakeCompiler("macOS 15.1"))
    assert cache.open(package, FakeCompiler("macOS 15.2")).compiled_now


def test_copy_is_replaced_when_it_does_not_open(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    place = cache.place(package, compiler.version)
    place.mkdir(parents=True)
    (place / "model").write_text("broken")
    assert cache.open(package, compiler).predict({}) == {"content": "{}"}
    assert (place / "model").read_text() == "{}"


def test_copy_stays_when_it_opens_the_second_time(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    cache.open(package, compiler)
    compiler.failures = 1
    assert not cache.open(package, compiler).compiled_now
    compiler.failures = 2
    assert cache.open(package, compiler).compiled_now
    assert len(compiler.compiled) == 2


def test_copy_is_never_touched(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    place = cache.open(package, compiler).compiled
    times = (1e9, 1e9)
    for path in (place, *place.rglob("*")):
        os.utime(path, times)
    cache.open(package, compiler)
    assert {path.stat().st_mtime for path in (place, *place.rglob("*"))} == {1e9}
    assert place.with_suffix(".used").stat().st_mtime > 1e9


def test_compiled_copy_is_made_once_without_opening(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler(failures=1)
    made = cache.compiled(package, compiler)
    assert made == cache.compiled(package, compiler) == cache.place(package, compiler.version)
    assert made.is_dir()
    assert (len(compiler.compiled), compiler.failures) == (1, 1)


def test_nothing_stays_behind_when_compiling_fails(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()

    def fail(package: Path, destination: Path) -> None:
        destination.mkdir()
        (destination / "half").touch()
        raise RuntimeError('Error compiling model: "Failed to parse\nthe model".')

    compiler.compile = fail  # type: ignore[method-assign]
    with pytest.raises(
        PackageError, match=r'mlpackage does not compile: Error compiling model: "Failed to parse the model"\.$'
    ):
        cache.open(package, compiler)
    assert list(cache.folder.iterdir()) == []


def test_package_error_when_the_compiler_writes_nothing(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    compiler.compile = lambda package, destination: None  # type: ignore[method-assign]
    with pytest.raises(PackageError, match="nothing was written"):
        cache.open(package, compiler)


def test_package_error_when_a_fresh_copy_does_not_open(package: Path, cache: CompiledCache) -> None:
    (package / "Manifest.json").write_text("broken")
    with pytest.raises(PackageError, match=r"was compiled but does not open: Core ML refuses\.$"):
        cache.open(package, FakeCompiler())


def test_the_other_copy_serves_when_another_process_was_faster(package: Path, cache: CompiledCache) -> None:
    compiler = FakeCompiler()
    slow_compile = compiler.compile

    def overtaken(package: Path, destination: Path) -> None:
        slow_compile(package, destination)
        place = cache.place(package, compiler.version)
        place.mkdir()
        (place / "model").write_text("theirs")

    compiler.compile = overtaken  # type: ignore[method-assign]
    assert cache.open(package, compiler).predict({}) == {"content": "theirs"}
    assert len(list(cache.folder.glob("*.mlmodelc"))) == 1


def test_output_error_of_the_cache_names_its_variable(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/cache cannot be written .*FASTVLM_CACHE"):
        CompiledCache(tmp_path / "file" / "cache").open(package, FakeCompiler())


def test_cache_folder_is_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (compiled_cache.ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert user_cache_folder() == tmp_path / ".cache" / "fastvlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_folder() == tmp_path / "xdg" / "fastvlm"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache_folder() == tmp_path / "Library" / "Caches" / "fastvlm"
    monkeypatch.setenv(compiled_cache.ENVIRONMENT_VARIABLE, "~/mine")
    assert user_cache_folder() == tmp_path / "mine"
    assert CompiledCache().folder == tmp_path / "mine" / "compiled"


def make_packages(tmp_path: Path, count: int) -> list[Path]:
    packages = []
    for n in range(count):
        folder = tmp_path / f"p{n}" / "fastvithd.mlpackage"
        folder.mkdir(parents=True)
        (folder / "Manifest.json").write_text(f"{n}")
        packages.append(folder)
    return packages


def test_copies_used_longest_ago_go_when_there_are_too_many(tmp_path: Path) -> None:
    now = 1e9
    cache, compiler = CompiledCache(tmp_path / "cache", max_copies=3), FakeCompiler()
    packages = make_packages(tmp_path, 5)
    for n in (0, 1, 2, 0, 3, 4):
        now += 10
        opened = cache.open(packages[n], compiler).compiled
        opened.with_suffix(".shares").touch()
        os.utime(opened.with_suffix(".used"), (now, now))
    kept = [n for n in range(5) if cache.place(packages[n], compiler.version).is_dir()]
    assert kept == [0, 3, 4]
    assert len(list(cache.folder.iterdir())) == 3 * len(kept)  # the records of a copy are removed with it
    assert not cache.open(packages[0], compiler).compiled_now


def test_newest_copy_stays_when_the_bound_is_one(tmp_path: Path) -> None:
    cache, compiler = CompiledCache(tmp_path / "cache", max_copies=1), FakeCompiler()
    for package in make_packages(tmp_path, 2):
        assert cache.open(package, compiler).compiled_now
        assert not cache.open(package, compiler).compiled_now
    assert len(list(cache.folder.glob("*.mlmodelc"))) == 1


def test_old_folders_of_killed_processes_are_removed(tmp_path: Path, package: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    old, young = cache.folder / ".compiling-old", cache.folder / ".compiling-young"
    for folder in (old, young):
        (folder / "half.mlmodelc").mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    cache.open(package, FakeCompiler())
    assert (old.exists(), young.exists()) == (False, True)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of recorded digests, with those of files that have just been written."""
    monkeypatch.setattr(compiled_cache, "SETTLED_SECONDS", -3600.0)
    return tmp_path / "records"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packages that were read, in order."""
    found: list[Path] = []
    content_digest = compiled_cache._content_digest
    monkeypatch.setattr(
        compiled_cache, "_content_digest", lambda package: (found.append(package), content_digest(package))[1]
    )
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


def test_package_that_has_just_changed_is_not_recorded(package: Path, tmp_path: Path, hashed: list[Path]) -> None:
    for _ in range(2):
        package_digest(package, "1", tmp_path / "records")
    assert len(hashed) == 2
    assert not (tmp_path / "records").exists()


def test_package_that_changes_while_it_is_read_is_not_recorded(
    package: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content_digest = compiled_cache._content_digest

    def overtaken(package: Path) -> str:
        found = content_digest(package)
        same_size_and_times(package)
        return found

    monkeypatch.setattr(compiled_cache, "_content_digest", overtaken)
    package_digest(package, "1", records)
    monkeypatch.setattr(compiled_cache, "_content_digest", content_digest)
    assert package_digest(package, "1", records) == package_digest(package, "1")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": [], "content": 3}', "\0"])
def test_damaged_record_of_a_digest_is_replaced(package: Path, records: Path, content: str, hashed: list[Path]) -> None:
    package_digest(package, "1", records)
    (record,) = records.iterdir()
    record.write_text(content)
    for _ in range(2):
        assert package_digest(package, "1", records)
    assert len(hashed) == 2


def test_records_are_bounded(package: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "MAX_RECORDS", 2)
    for n in range(4):
        package_digest(shutil.copytree(package, package.with_name(f"p{n}")), "1", records)
    assert len(list(records.iterdir())) == 2


def test_digest_is_found_when_records_cannot_be_written(package: Path, records: Path) -> None:
    records.touch()
    assert package_digest(package, "1", records) == package_digest(package, "1")
