"""The places of bundles, what they leave alone, and the pins of the app's Swift packages."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.export.bundle import place, write
from fastvlm.export.bundle.check import check_bundle
from fastvlm.export.bundle.contracts import Contract
from fastvlm.export.bundle.place import (
    CHOSEN,
    DEPENDENCIES,
    MAX_OTHERS,
    RESOLVED,
    VERSIONS_NOTE,
    other_files,
    package_resolved,
    pin_packages,
    publish_with_others,
)
from fastvlm.export.bundle.write import bundle
from fastvlm.models.errors import OutputError

PROJECT = "".join(f'repositoryURL = "{pin.location}";\n' for pin in CHOSEN)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_zips_are_equal_and_hold_the_bundle(bundles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    first = bundle(folders["mlx"], "mlx-vlm", tmp_path / "first", zipped=True).path
    second = bundle(folders["mlx"], "mlx-vlm", tmp_path / "second.zip", zipped=True).path
    assert first == tmp_path / "first.zip"
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == contents(bundles["mlx-vlm"])
        assert archive.namelist() == sorted(archive.namelist())
    bundle(folders["mlx"], "mlx-vlm", first, zipped=True)  # over an earlier one
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.zip", "second.zip"]


def test_zip_that_is_not_a_bundle_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.jpg", b"")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="exists and is not the zip of a bundle"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "photos.zip", zipped=True)
    assert contents(tmp_path) == before


def test_app_checkout_gets_the_model_in_its_place(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "app" / "FastVLM" / "model"
    model.mkdir(parents=True)
    (model.parent / "FastVLM.swift").write_text("// Swift")
    (model / "README.txt").write_text("put models here")
    (model / "more").mkdir()
    (model / "more" / "link").symlink_to("../README.txt")
    (model / "empty").mkdir()
    os.chmod(model / "README.txt", 0o640)  # noqa: PTH101
    before = (model / "README.txt").stat()
    assert bundle(folders["coreml"], "apple-app", tmp_path).path == model
    assert check_bundle(model, "apple-app").passed
    after = (model / "README.txt").stat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert (model / "more" / "link").readlink() == Path("../README.txt")
    assert (model / "empty").is_dir()
    bundle(folders["coreml"], "apple-app", tmp_path / "app")  # again, over the earlier one
    assert (model / "README.txt").read_text() == "put models here"
    assert sorted(path.name for path in model.parent.iterdir()) == ["FastVLM.swift", "model"]


def checkout(root: Path) -> Path:
    """The app's own folder, in a checkout of ml-fastvlm."""
    (root / "app" / "FastVLM").mkdir(parents=True)
    (root / "app" / "FastVLM" / "FastVLM.swift").write_text("// Swift")
    (root / "app" / "FastVLM.xcodeproj").mkdir()
    urls = "".join(f'repositoryURL = "{pin.location}";' for pin in CHOSEN)
    (root / "app" / "FastVLM.xcodeproj" / "project.pbxproj").write_text(urls)
    return root / "app" / "FastVLM"


def test_app_folder_holds_nothing_unfinished(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a synchronized group: Xcode takes what appears in it for a part of the project."""
    synchronized, seen = checkout(tmp_path), []
    write_files = write.write_files

    def watched(source: Path, written: Path, contract: Contract) -> None:
        seen.append(written.parent)
        assert [path.name for path in synchronized.iterdir() if path.name.startswith(".")] == []
        write_files(source, written, contract)

    monkeypatch.setattr(write, "write_files", watched)
    abandoned = tmp_path / "app" / ".model.partial-999999999"
    abandoned.mkdir()
    for _ in range(2):
        bundle(folders["coreml"], "apple-app", tmp_path)
    assert seen == [tmp_path / "app"] * 2
    assert check_bundle(synchronized / "model", "apple-app").passed
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == ["FastVLM", "FastVLM.xcodeproj"]


def test_app_bundle_says_what_it_builds_with(folders: dict[str, Path], tmp_path: Path) -> None:
    checkout(tmp_path / "clone")
    result = bundle(folders["coreml"], "apple-app", tmp_path / "clone")
    assert "Package.resolved pins" in result.notes[-1]
    assert (tmp_path / "clone" / "app" / "FastVLM.xcodeproj" / RESOLVED).is_file()
    assert "exists and was not changed" in bundle(folders["coreml"], "apple-app", tmp_path / "clone").notes[-1]
    assert bundle(folders["coreml"], "apple-app", tmp_path / "elsewhere").notes[-1] == VERSIONS_NOTE
    assert VERSIONS_NOTE not in bundle(folders["mlx"], "mlx-swift-lm", tmp_path / "other").notes


def test_files_of_an_earlier_bundle_that_are_no_longer_needed_go(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle(folders["coreml"], "apple-app", tmp_path / "b")
    (tmp_path / "b" / "mine.txt").write_text("kept")
    bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    assert not (tmp_path / "b" / "fastvithd.mlpackage").exists()
    assert check_bundle(tmp_path / "b", "mlx-vlm").passed
    assert (tmp_path / "b" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["config.json", "fastvithd.mlpackage/Manifest.json"])
def test_files_of_others_are_never_replaced(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "b" / name).parent.mkdir(parents=True)
    (tmp_path / "b" / name).write_text("somebody else's")
    with pytest.raises(OutputError, match="is not from an earlier bundle and is in the way"):
        bundle(folders["coreml"], "apple-app", tmp_path / "b")
    assert contents(tmp_path) == {f"b/{name}": b"somebody else's"}


def test_bundled_files_that_were_changed_since_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="config.json was changed after it was bundled"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_text() == "{}"


def test_folder_of_something_else_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    for index in range(MAX_OTHERS + 1):
        (tmp_path / f"{index}.txt").write_text("")
    with pytest.raises(OutputError, match="Choose a new folder inside it"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path)
    assert len(list(tmp_path.iterdir())) == MAX_OTHERS + 1


def test_damaged_bundle_manifest_replaces_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "fastvlm-bundle.json").write_text('{"files": {"../../etc/passwd": {"sha256": "0"}}}')
    with pytest.raises(OutputError, match="is damaged"):
        bundle(folders["mlx"], "mlx-vlm", tmp_path)


def test_file_that_turns_up_meanwhile_stops_the_bundle(tmp_path: Path) -> None:
    (partial := tmp_path / "partial").mkdir()
    (partial / "config.json").write_text("new")
    (folder := tmp_path / "b").mkdir()
    (folder / "config.json").write_text("somebody else's")
    with pytest.raises(OutputError, match="in the way"):
        publish_with_others(partial, folder)
    assert (folder / "config.json").read_text() == "somebody else's"


def test_finders_files_in_a_bundle_are_not_in_the_way(tmp_path: Path) -> None:
    (partial := tmp_path / ".b.partial-1" / "fastvithd.mlpackage").mkdir(parents=True)
    (partial / "Manifest.json").write_text("new")
    (package := tmp_path / "b" / "fastvithd.mlpackage").mkdir(parents=True)
    for name in (".DS_Store", "._Manifest.json"):
        (package / name).write_bytes(b"x")
    assert other_files(tmp_path / "b", {}) == []
    publish_with_others(partial.parent, tmp_path / "b")
    assert [path.name for path in package.iterdir()] == ["Manifest.json"]


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

    write_new = place._write_new
    monkeypatch.setattr(place, "_write_new", overtaken)
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
