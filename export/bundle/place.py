"""The place of a bundle: a new folder, one with an earlier bundle, a checkout of Apple's app, or a zip file.

A checkout also gets the pins of the Swift packages that build today's version of the app. Its project accepts any
version below the next major one, and later minor versions do not build with its code (apple/ml-fastvlm, issues 37, 39
and 65). The revisions are those of the tags in the packages' own repositories. The dependencies' versions are those
that mlx-swift-examples pinned with the first three packages (its commit a6cb969).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...models.errors import OutputError
from ...models.files import is_file, read_json_object, sha256
from ...models.folder_layout import PACKAGE_NAME
from ...models.foreign_files import is_system_file
from ..atomic_folder import publish
from .contracts import Contract

BUNDLE_MANIFEST = "fastvlm-bundle.json"
MANIFEST_FORMAT = 1
APP_FOLDERS = ("app/FastVLM", "FastVLM")
"""The places of `FastVLM.swift` in a checkout of ml-fastvlm and in its `app`. The model is in `model` next to it."""

MAX_OTHERS = 200
"""The most other files in a model's folder. With more, it is a folder for something else."""

ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The time of every entry, so that equal bundles give equal bytes. It is the earliest that zip files have."""

ZIP_MODE = 0o644 << 16
UNIX = 3

PROJECT = "FastVLM.xcodeproj"
RESOLVED = "project.xcworkspace/xcshareddata/swiftpm/Package.resolved"
RESOLVED_FORMAT = 2
"""The format that Xcode 13.3 and newer read. Format 3 adds a hash of the project, which only Xcode can compute."""


def bundle_folder(out: Path, contract: Contract) -> Path:
    """Returns the bundle's folder: `out`, or the model's folder if `out` is a checkout of the app."""
    for name in APP_FOLDERS if contract.encoder == "coreml" else ():
        if (out / name / "FastVLM.swift").is_file():
            return out / name / "model"
    return out


def app_folder(folder: Path) -> Path | None:
    """Returns the checkout's `app` if `folder` is the model's folder in it, or None."""
    return folder.parent.parent if (folder.parent / "FastVLM.swift").is_file() else None


def earlier_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of an earlier bundle's files by name. Raises OutputError if its manifest is malformed."""
    manifest = folder / BUNDLE_MANIFEST
    if not manifest.is_file():
        return {}
    files = read_json_object(manifest, OutputError).get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise OutputError(f"{manifest} is damaged. Remove it and the files of the bundle, or choose another folder.")
    return {name: entry["sha256"] for name, entry in files.items()}


def _is_entry(name: str, entry: Any) -> bool:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(entry, dict) and isinstance(entry.get("sha256"), str)


def check_place(folder: Path, contract: Contract) -> None:
    """Raises OutputError if other files than an earlier bundle's are in the way, before anything is written."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} exists and is not a folder. Choose another one.")
    if not folder.is_dir():
        return
    earlier = earlier_files(folder)
    for name, digest in earlier.items():
        file = folder / name
        if is_file(file) and sha256(file) != digest:
            raise OutputError(f"{file} was changed after it was bundled. Keep a copy elsewhere and remove it first.")
    mine = {PACKAGE_NAME, "tokenizer.json", "model.safetensors", *contract.rules}
    others = other_files(folder, earlier)
    taken = sorted(str(file) for file in others if file.parts[0] in mine)
    if taken:
        raise OutputError(
            f"{folder / taken[0]} is not from an earlier bundle and is in the way. Move it, or choose another folder."
        )
    if len(others) > MAX_OTHERS:
        raise OutputError(f"{folder} has more than {MAX_OTHERS} other files. Choose a new folder inside it.")


def other_files(folder: Path, earlier: Mapping[str, str]) -> list[Path]:
    """Returns the files and links in `folder`, relative to it, that are not from an earlier bundle."""
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if is_system_file(path):
            continue
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in {*earlier, BUNDLE_MANIFEST}:
            found.append(name)
        if len(found) > MAX_OTHERS:
            break
    return found


def publish_with_others(partial: Path, folder: Path) -> None:
    """Gives the bundle its name. Other files in the folder that it replaces are moved along unchanged."""
    if folder.is_dir():
        for name in other_files(folder, earlier_files(folder)):
            target = partial / name
            if target.exists() or target.is_symlink():
                raise OutputError(f"{folder / name} is not from an earlier bundle and is in the way. Move it first.")
            target.parent.mkdir(parents=True, exist_ok=True)
            carry(folder / name, target)
        carry_empty_folders(folder, partial)
    publish(partial, folder)


def carry_empty_folders(folder: Path, partial: Path) -> None:
    """Makes the empty folders of `folder` in `partial`."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            (partial / path.relative_to(folder)).mkdir(parents=True, exist_ok=True)


def carry(source: Path, target: Path) -> None:
    """Links `source` to the name `target`, or copies it if the file system has no hard links."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def check_zip(file: Path) -> None:
    """Raises OutputError unless `file` is absent or the zip of an earlier bundle."""
    if not file.exists() and not file.is_symlink():
        return
    if not file.is_file() or not is_bundle_zip(file):
        raise OutputError(f"{file} exists and is not the zip of a bundle. Choose another name.")


def is_bundle_zip(file: Path) -> bool:
    """Returns True for a zip file with a bundle's manifest."""
    try:
        with zipfile.ZipFile(file) as archive:
            return BUNDLE_MANIFEST in archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def publish_zip(partial: Path, file: Path) -> None:
    """Writes the files in `partial` as a zip: sorted, uncompressed, with one time, so that equal bundles are equal."""
    content = sorted(path for path in partial.rglob("*") if path.is_file())
    temporary = partial / ".zip"  # in there, so that it is removed with the folder
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in content:
            entry = zipfile.ZipInfo(path.relative_to(partial).as_posix(), ZIP_TIME)
            entry.external_attr, entry.create_system = ZIP_MODE, UNIX
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 2**20)
    temporary.replace(file)


@dataclass(frozen=True)
class Pin:
    """A version of a Swift package."""

    location: str
    version: str
    revision: str
    """The commit of the version's tag."""

    @property
    def identity(self) -> str:
        """The name that Swift's package manager derives from the address."""
        return self.location.rpartition("/")[2].removesuffix(".git").lower()


CHOSEN = (
    Pin("https://github.com/ml-explore/mlx-swift-examples", "2.21.2", "6ef303b84ec69e2e1e1da68f2059e99ee1dcef4d"),
    Pin("https://github.com/ml-explore/mlx-swift", "0.21.3", "b990c58153af70eb0914bca7dd74401d341fa9ae"),
    Pin("https://github.com/huggingface/swift-transformers", "0.1.19", "ebee6216c1250f046e362daed3806458aaa0ca1c"),
)
"""The packages of the project, in versions that are reported to build (apple/ml-fastvlm, issue 39)."""

DEPENDENCIES = (
    Pin("https://github.com/1024jp/GzipSwift", "6.0.1", "731037f6cc2be2ec01562f6597c1d0aa3fe6fd05"),
    Pin("https://github.com/johnmai-dev/Jinja", "1.1.2", "31c4dd39bcdc07eaa42a384bdc88ea599022b800"),
    Pin("https://github.com/apple/swift-argument-parser.git", "1.4.0", "0fbc8848e389af3bb55c182bc19ca9d5dc2f255b"),
    Pin("https://github.com/apple/swift-async-algorithms", "1.0.4", "042e1c4d9d19748c9c228f8d4ebc97bb1e339b0b"),
    Pin("https://github.com/apple/swift-collections.git", "1.1.4", "671108c96644956dddcd89dd59c203dcdb36cec7"),
    Pin("https://github.com/apple/swift-numerics", "1.0.3", "e0ec0f5f3af6f3e4d5e7a19d2af26b481acb6ba8"),
)
"""The dependencies of the chosen packages."""

VERSIONS = ", ".join(f"{pin.identity} {pin.version}" for pin in CHOSEN)
CLICKS = "in Xcode, under Package Dependencies of the project, give each of them the rule Exact Version"
VERSIONS_NOTE = f"the app builds with {VERSIONS}, but not with the newest versions that Xcode finds: {CLICKS}"


def package_resolved() -> str:
    """Returns the content of `Package.resolved` with all pins."""
    pins = [
        {
            "identity": pin.identity,
            "kind": "remoteSourceControl",
            "location": pin.location,
            "state": {"revision": pin.revision, "version": pin.version},
        }
        for pin in sorted((*CHOSEN, *DEPENDENCIES), key=lambda pin: pin.identity)
    ]
    return json.dumps({"pins": pins, "version": RESOLVED_FORMAT}, indent=2) + "\n"


def pin_packages(app: Path) -> str:
    """Writes `Package.resolved` for the project in `app` unless it exists, and returns a note for the user.

    An existing file is never overwritten, and a project with other packages gets none.
    """
    project, resolved = app / PROJECT, app / PROJECT / RESOLVED
    if os.path.lexists(resolved):
        return f"{VERSIONS_NOTE}. {resolved} exists and was not changed"
    if not _names_the_packages(project / "project.pbxproj"):
        return VERSIONS_NOTE
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        _write_new(resolved, package_resolved())
    except OSError as reason:
        return f"{VERSIONS_NOTE}. {resolved} cannot be written ({reason.strerror or reason})"
    return f"{resolved} pins the versions that build the app: {VERSIONS}. If Xcode updates them, {CLICKS}"


def _names_the_packages(project: Path) -> bool:
    try:
        text = project.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return all(f'repositoryURL = "{pin.location}";' in text for pin in CHOSEN) and (
        text.count("repositoryURL = ") == len(CHOSEN)
    )


def _write_new(file: Path, content: str) -> None:
    """Writes a complete file. Raises FileExistsError if it exists."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        os.link(name, file)
    finally:
        with contextlib.suppress(OSError):
            Path(name).unlink()
