"""Pins of the app's Swift packages: written once, whole, and only for the project that they are for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.export.bundle import swift_packages
from fastvlm.export.bundle.swift_packages import (
    CHOSEN,
    DEPENDENCIES,
    RESOLVED,
    VERSIONS_NOTE,
    package_resolved,
    pin_packages,
)

PROJECT = "".join(f'repositoryURL = "{pin.location}";\n' for pin in CHOSEN)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The `app` folder of a fresh checkout."""
    project = tmp_path / "app" / "FastVLM.xcodeproj"
    project.mkdir(parents=True)
    (project / "project.pbxproj").write_text(PROJECT)
    return tmp_path / "app"


def test_pins_are_in_the_form_of_xcode() -> None:
    content = json.loads(package_resolved())
    assert content["version"] == 2
    identities = [pin["identity"] for pin in content["pins"]]
    assert identities == sorted(set(identities))
    assert len(identities) == len(CHOSEN) + len(DEPENDENCIES) == 9
    for pin in content["pins"]:
        assert re.fullmatch(r"[0-9a-f]{40}", pin["state"]["revision"])
        assert re.fullmatch(r"\d+\.\d+\.\d+", pin["state"]["version"])
        assert pin["kind"] == "remoteSourceControl"
    argument_parser = next(pin for pin in content["pins"] if pin["identity"] == "swift-argument-parser")
    assert argument_parser["location"].endswith("/swift-argument-parser.git")


def test_fresh_checkout_gets_the_pins(app: Path) -> None:
    note = pin_packages(app)
    resolved = app / "FastVLM.xcodeproj" / RESOLVED
    assert resolved.read_text() == package_resolved()
    assert str(resolved) in note
    assert "mlx-swift-examples 2.21.2, mlx-swift 0.21.3, swift-transformers 0.1.19" in note
    assert [path.name for path in resolved.parent.iterdir()] == ["Package.resolved"]
    assert resolved.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("link", [False, True])
def test_pins_that_are_there_are_left(app: Path, link: bool) -> None:
    resolved = app / "FastVLM.xcodeproj" / RESOLVED
    resolved.parent.mkdir(parents=True)
    if link:
        resolved.symlink_to("nowhere")
    else:
        resolved.write_text("mine")
    note = pin_packages(app)
    assert resolved.is_symlink() if link else resolved.read_text() == "mine"
    assert note.startswith(VERSIONS_NOTE)
    assert "was not changed" in note


def test_pins_that_appear_meanwhile_are_left(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = app / "FastVLM.xcodeproj" / RESOLVED

    def overtaken(file: Path, content: str) -> None:
        file.write_text("theirs")
        write_new(file, content)

    write_new = swift_packages._write_new
    monkeypatch.setattr(swift_packages, "_write_new", overtaken)
    assert "cannot be written (File exists)" in pin_packages(app)
    assert resolved.read_text() == "theirs"
    assert [path.name for path in resolved.parent.iterdir()] == ["Package.resolved"]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(PROJECT.replace("mlx-swift-examples", "mlx-swift-lm")),
        lambda file: file.write_text(PROJECT + 'repositoryURL = "https://github.com/x/y";\n'),
    ],
    ids=["no project", "another package", "one more package"],
)
def test_other_project_gets_a_note_only(app: Path, change: Callable[[Path], object]) -> None:
    change(app / "FastVLM.xcodeproj" / "project.pbxproj")
    assert pin_packages(app) == VERSIONS_NOTE
    assert not (app / "FastVLM.xcodeproj" / "project.xcworkspace").exists()
    assert "Exact Version" in VERSIONS_NOTE


def test_pins_that_cannot_be_written_are_noted(app: Path) -> None:
    (app / "FastVLM.xcodeproj" / "project.xcworkspace").write_text("a file")
    assert "cannot be written" in pin_packages(app)
