"""The engine's share of a compiled copy: planned once, recorded next to it, and noted if it is small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.compute_plan import CPU, ENGINE, Place, Placement
from fastvlm.models.errors import FastVLMError, MachineError, PackageError
from fastvlm.runtime import coreml
from fastvlm.runtime.compiled_cache import CompiledCache
from fastvlm.runtime.engine_share import compiled_copy, engine_share, share_note

Plan = Callable[[Path, str], Placement]


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    folder = tmp_path / "fastvithd-0123.mlmodelc"
    folder.mkdir()
    return folder


def plan(share: float, asked: list[str] | None = None) -> Plan:
    def planned(compiled: Path, compute_units: str) -> Placement:
        if asked is not None:
            asked.append(compute_units)
        return Placement((Place("x", "conv", ENGINE, share), Place("y", "conv", CPU, 1 - share)))

    return planned


def failing(error: FastVLMError) -> Plan:
    def planned(compiled: Path, compute_units: str) -> Placement:
        raise error

    return planned


def test_share_is_planned_once_for_each_unit(compiled: Path) -> None:
    asked: list[str] = []
    for _ in range(2):
        assert engine_share(compiled, "CPU_AND_NE", plan(0.75, asked)) == pytest.approx(0.75)
        assert engine_share(compiled, "ALL", plan(0.5, asked)) == pytest.approx(0.5)
    assert asked == ["CPU_AND_NE", "ALL"]
    assert {path.name for path in compiled.parent.iterdir()} == {compiled.name, f"{compiled.stem}.shares"}
    assert list(compiled.iterdir()) == []  # the copy itself is not touched


@pytest.mark.parametrize("units", ["CPU_ONLY", "CPU_AND_GPU"])
def test_units_without_the_engine_have_no_share(compiled: Path, units: str) -> None:
    assert engine_share(compiled, units, plan(0.75)) is None
    assert share_note(compiled, units, plan(0.0)) is None


def test_plan_that_fails_is_not_made_again(compiled: Path) -> None:
    assert engine_share(compiled, plan=failing(PackageError("no plan"))) is None
    assert engine_share(compiled, plan=plan(0.75)) is None


def test_plan_that_crashes_is_made_again(compiled: Path) -> None:
    assert engine_share(compiled, plan=failing(MachineError("SIGABRT"))) is None
    assert engine_share(compiled, plan=plan(0.75)) == pytest.approx(0.75)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"CPU_AND_NE": "much"}', '{"CPU_AND_NE": []}', "\0"])
def test_damaged_record_is_replaced(compiled: Path, content: str) -> None:
    compiled.with_suffix(".shares").write_text(content)
    assert engine_share(compiled, plan=plan(0.75)) == pytest.approx(0.75)
    assert engine_share(compiled, plan=plan(0.5)) == pytest.approx(0.75)


def test_share_is_found_when_it_cannot_be_recorded(tmp_path: Path) -> None:
    assert engine_share(tmp_path / "none" / "a.mlmodelc", plan=plan(0.75)) == pytest.approx(0.75)


@pytest.mark.parametrize(("share", "noted"), [(0.0, "places 0% of"), (0.89, "places 89% of"), (0.9, None), (1, None)])
def test_note_where_the_share_is_small(compiled: Path, share: float, noted: str | None) -> None:
    note = share_note(compiled, plan=plan(share))
    assert note is None if noted is None else note is not None and noted in note


def test_copy_is_compiled_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiler:
        version = "macOS 15.1"

        def compile(self, package: Path, destination: Path) -> None:
            destination.mkdir()

    package = tmp_path / "a.mlpackage"
    package.mkdir()
    (package / "Manifest.json").touch()
    monkeypatch.setattr(coreml, "CoreMLTools", lambda units: Compiler())
    cache = CompiledCache(tmp_path / "cache")
    assert compiled_copy(package, cache=cache) == cache.place(package, "macOS 15.1")
    assert cache.place(package, "macOS 15.1").is_dir()
