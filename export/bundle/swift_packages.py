"""The Swift packages that build today's version of Apple's app, and their pins for Xcode.

The app's project accepts any version below the next major one, and later minor versions do not build with its code
(apple/ml-fastvlm, issues 37, 39 and 65). The revisions are those of the tags in the packages' own repositories. The
dependencies' versions are those that mlx-swift-examples pinned with the first three packages (its commit a6cb969).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = "FastVLM.xcodeproj"
RESOLVED = "project.xcworkspace/xcshareddata/swiftpm/Package.resolved"
RESOLVED_FORMAT = 2
"""The format that Xcode 13.3 and newer read. Format 3 adds a hash of the project, which only Xcode can compute."""


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
