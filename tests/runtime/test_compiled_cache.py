"""Compiled packages: made once, found again by content, never seen half done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm.models.errors import OutputError, PackageError
from fastvlm.runtime import compiled_cache
from fastvlm.runtime.compiled_cache import CompiledCache, user_cache_folder


class FakeCompiler:
    """Compiles by copying the manifest; opens what is whole."""

    def __init__(self, version: str = "macOS 15.1", failures: int = 0) -> None:
        self.version = version
        self.compiled: list[Path] = []
        self.failures = failures
        """Times that opening fails for a reason that passes."""

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


def test_output_error_names_the_variable_when_the_cache_cannot_be_written(package: Path, tmp_path: Path) -> None:
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
    assert len(list(cache.folder.iterdir())) == 3 * len(kept)  # what is recorded of a copy goes with it
    assert not cache.open(packages[0], compiler).compiled_now


def test_newest_copy_stays_when_the_bound_is_one(tmp_path: Path) -> None:
    cache, compiler = CompiledCache(tmp_path / "cache", max_copies=1), FakeCompiler()
    for package in make_packages(tmp_path, 2):
        assert cache.open(package, compiler).compiled_now
        assert not cache.open(package, compiler).compiled_now
    assert len(list(cache.folder.glob("*.mlmodelc"))) == 1


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path: Path, package: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    old, young = cache.folder / ".compiling-old", cache.folder / ".compiling-young"
    for folder in (old, young):
        (folder / "half.mlmodelc").mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    cache.open(package, FakeCompiler())
    assert (old.exists(), young.exists()) == (False, True)
