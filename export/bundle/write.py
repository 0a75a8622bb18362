"""`fastvlm bundle`: a model folder becomes the assets of a client, checked against its contract before they appear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...models.errors import VerificationError
from ...models.files import check_space, read_json_object, write_json
from ...models.folder_layout import MANIFEST_NAME
from ..model_folder import file_table
from ..output import new_folder
from ..verify import check_hashes
from .check import bundle_faults
from .contract import Contract
from .convert import write_files
from .memory import Estimate, estimate
from .place import (
    BUNDLE_MANIFEST,
    MANIFEST_FORMAT,
    app_folder,
    bundle_folder,
    check_place,
    check_zip,
    publish_beside_others,
    publish_zip,
)
from .requirements import check_requirements
from .swift_packages import VERSIONS_NOTE, pin_packages
from .targets import contract_for

LICENCE_NOTE = "FastVLM's weights carry Apple's research-only model licence: see that what you ship may be shipped"


@dataclass(frozen=True)
class Bundle:
    """A finished bundle."""

    path: Path
    """Its folder or zip file."""
    target: str
    files: Mapping[str, Mapping[str, Any]]
    """Size (`bytes`) and `sha256` of each file, by its path in the bundle."""
    estimate: Estimate
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "target": self.target,
            "total_bytes": self.total_bytes,
            "file_bytes": {name: entry["bytes"] for name, entry in self.files.items()},
            "memory": self.estimate.as_dict(),
            "notes": list(self.notes),
        }


def bundle(
    folder: str | Path,
    target: str,
    to: str | Path,
    *,
    zipped: bool = False,
    context: int | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Writes the assets that a client wants of the model in `folder`.

    `target` is `apple-app`, `mlx-swift-lm` or `mlx-vlm`. `to` is a folder of its own, one with an earlier bundle, a
    checkout of the app, or with `zipped` a zip file. Only an earlier bundle's files are replaced. `context` is the
    number of tokens that the memory estimate counts on: 2,048 by default, or all that the model has.

    Raises:
        UsageError: the client cannot run this model; the message says how to export it.
        FastVLMError: the folder is damaged, or the bundle cannot be written. Nothing is left behind.
    """
    source, contract = Path(folder).expanduser(), contract_for(target)
    destination = zip_path(to) if zipped else bundle_folder(Path(to).expanduser(), contract)
    check_requirements(source, contract)
    memory = estimate(source, contract, context)
    manifest = source_manifest(source)
    if manifest:
        on_stage("compare files with the manifest")
        check_hashes(source)
    check: Callable[[Path], None] = check_zip if zipped else partial(check_place, contract=contract)
    check(destination)
    check_space(destination, (2 if zipped else 1) * sum(file.stat().st_size for file in all_files(source)))
    finish: Callable[[Path, Path], None] = publish_zip if zipped else publish_beside_others
    # In the app's own folder Xcode would take the unfinished model for a part of the project.
    app = None if zipped or contract.layout != "apple" else app_folder(destination)
    with new_folder(destination, force=True, check=check, finish=finish, workplace=app) as written:
        on_stage("write the bundle")
        write_files(source, written, contract)
        on_stage("check it against the contract")
        check_faults(written, contract)
        files = file_table(written)
        notes = bundle_notes(manifest)
        write_json(written / BUNDLE_MANIFEST, bundle_manifest(contract, manifest, files, notes))
    if contract.layout == "apple":
        notes = (*notes, pin_packages(app) if app else VERSIONS_NOTE)
    return Bundle(destination, target, files, memory, notes)


def zip_path(to: str | Path) -> Path:
    path = Path(to).expanduser()
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")


def all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def source_manifest(source: Path) -> Mapping[str, Any]:
    """The export's manifest; empty for a folder that came without one."""
    file = source / MANIFEST_NAME
    return read_json_object(file) if file.is_file() else {}


def check_faults(written: Path, contract: Contract) -> None:
    """Raises VerificationError when what was written is not what the client wants: the model folder is at fault."""
    faults = list(bundle_faults(written, contract))
    if faults:
        raise VerificationError(f"no bundle for {contract.name} was written: {'; '.join(faults[:4])}")


def bundle_notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    told = manifest.get("notes")
    notes = [note for note in told if isinstance(note, str)] if isinstance(told, list) else []
    name = manifest.get("source", {}).get("name") if isinstance(manifest.get("source"), Mapping) else None
    if manifest.get("trained") is not False and name != "tiny":
        notes.append(LICENCE_NOTE)
    return tuple(notes)


def bundle_manifest(
    contract: Contract, manifest: Mapping[str, Any], files: Mapping[str, Any], notes: tuple[str, ...]
) -> dict[str, Any]:
    """The content of `fastvlm-bundle.json`. It holds no dates and no paths: equal folders give equal bundles."""
    return {
        "format": MANIFEST_FORMAT,
        "fastvlm": __version__,
        "target": contract.name,
        "contract": contract.source,
        "source": manifest.get("source"),
        "notes": list(notes),
        "files": files,
    }
