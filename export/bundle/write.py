"""`fastvlm.bundle`: a model folder becomes the assets of a client, checked against its contract before they appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...models.errors import ModelFolderError, UsageError, VerificationError
from ...models.fastvit_config import FastViTConfig
from ...models.files import check_space, read_json_object, write_json
from ...models.folder_layout import CONFIG_NAME, EMBEDS_NAME, MANIFEST_NAME, PACKAGE_NAME, has_mlx_encoder
from ..atomic_folder import new_folder
from ..model_folder import file_table
from ..options import OnStage, silent
from ..verify import check_hashes
from .check import bundle_faults
from .contracts import Contract, contract_for
from .convert import encoder_config_of, write_files
from .memory import Estimate, estimate
from .place import (
    BUNDLE_MANIFEST,
    MANIFEST_FORMAT,
    app_folder,
    bundle_folder,
    check_place,
    check_zip,
    publish_with_others,
    publish_zip,
)
from .swift_packages import VERSIONS_NOTE, pin_packages

if TYPE_CHECKING:
    from ...models.mlprogram import Program

LICENCE_NOTE = "FastVLM's weights have Apple's research-only model licence: check that you may ship them"

MAX_LISTED = 4
"""The most faults in an error."""

EXPORT_ARGUMENTS = ("encoder", "decoder_bits", "io", "with_projector", "image_size")
"""The arguments of an export that an error of `check_requirements` may name."""


@dataclass(frozen=True)
class Bundle:
    """A finished bundle."""

    path: Path
    """The folder or zip file."""
    client: str
    files: Mapping[str, Mapping[str, Any]]
    """The size (`bytes`) and `sha256` of each file, by its path in the bundle."""
    estimate: Estimate
    notes: tuple[str, ...]
    """Remarks for the user, one line each."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all files but the bundle's manifest."""
        return sum(entry["bytes"] for entry in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""
        return {
            "path": str(self.path),
            "target": self.client,
            "total_bytes": self.total_bytes,
            "file_bytes": {name: entry["bytes"] for name, entry in self.files.items()},
            "memory": self.estimate.as_dict(),
            "notes": list(self.notes),
        }


def bundle(
    folder: str | Path,
    client: str,
    out: str | Path,
    *,
    zipped: bool = False,
    context: int | None = None,
    on_stage: OnStage = silent,
) -> Bundle:
    """Packages a model folder for a client, and validates the result against the client's loader.

    Args:
        folder: an exported model folder.
        client: `apple-app`, `mlx-swift-lm` or `mlx-vlm`.
        out: a new folder, one with an earlier bundle, or a checkout of Apple's app. With `zipped` it is a zip file.
            Only files of an earlier bundle are overwritten.
        zipped: True writes one zip file instead of a folder.
        context: the tokens of context for the memory estimate. The default is 2048, or the model's limit if that is
            less.
        on_stage: a function that is called with a short description of each stage before it begins.

    Returns:
        The path of the bundle, its files, the memory estimate, and remarks.

    Raises:
        UsageError: the client is unknown, or cannot run this model. The message has the arguments of an export that
            it can run.
        FastVLMError: the folder is damaged, or the bundle cannot be written. Nothing is left behind.
    """
    source, contract = Path(folder).expanduser(), contract_for(client)
    destination = zip_path(out) if zipped else bundle_folder(Path(out).expanduser(), contract)
    check_requirements(source, contract)
    memory = estimate(source, contract, context)
    manifest = source_manifest(source)
    if manifest:
        on_stage("compare files with the manifest")
        check_hashes(source)
    check: Callable[[Path], None] = check_zip if zipped else partial(check_place, contract=contract)
    check(destination)
    check_space(destination, (2 if zipped else 1) * sum(file.stat().st_size for file in all_files(source)))
    finish: Callable[[Path, Path], None] = publish_zip if zipped else publish_with_others
    # An unfinished model in the app's own folder would become a part of the Xcode project.
    app = None if zipped or contract.encoder != "coreml" else app_folder(destination)
    with new_folder(destination, force=True, check=check, finish=finish, workplace=app) as written:
        on_stage("write the bundle")
        write_files(source, written, contract)
        on_stage("check it against the contract")
        check_faults(written, contract)
        files = file_table(written)
        notes = bundle_notes(manifest)
        write_json(written / BUNDLE_MANIFEST, bundle_manifest(contract, manifest, files, notes))
    if contract.encoder == "coreml":
        notes = (*notes, pin_packages(app) if app else VERSIONS_NOTE)
    return Bundle(destination, client, files, memory, notes)


def check_requirements(folder: Path, contract: Contract) -> None:
    """Checks that the client can run the model in `folder`.

    Raises:
        UsageError: it cannot. The message has the arguments of an export that it can run.
        ModelFolderError: `folder` is not a model folder.
        PackageError: its package cannot be read.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder. Pass one that `fastvlm export` wrote.")
    config = read_json_object(folder / CONFIG_NAME, ModelFolderError)
    if contract.channels and config.get("mm_hidden_size") != contract.channels:  # no other export helps
        lacks = [
            f"{contract.title} needs the {contract.channels} channels of FastViTHD (got "
            f"{config.get('mm_hidden_size')!r:.40})"
        ]
    else:
        lacks = list(_package_lacks(folder, contract) if contract.encoder == "coreml" else _mlx_lacks(folder, contract))
        lacks += [
            f"{contract.title} cannot load the decoder, because {fault}. Export again with decoder_bits 4, 6 or 8"
            for fault in contract.decoder_faults(config)
        ]
    if lacks:
        raise UsageError(f"{folder} cannot be bundled for {contract.name}: {'; '.join(lacks)}.", *EXPORT_ARGUMENTS)


def _package_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    from ...models.mlprogram import read_package

    if not (folder / PACKAGE_NAME).is_dir():
        yield f"{contract.title} runs a Core ML package. Export again with encoder='coreml'"
        return
    program = read_package(folder / PACKAGE_NAME)
    options = list(_interface_options(program, contract))
    if options:
        found = ", ".join(f"{t.name} {t}" for t in (*program.inputs, *program.outputs))
        yield f"the package has {found}. Export again with {', '.join(options)}"


def _interface_options(program: Program, contract: Contract) -> Iterator[str]:
    """Yields the arguments of an export whose package fits."""
    tensors = (*program.inputs, *program.outputs)
    if program.image_inputs or any(tensor.dtype != "fp32" for tensor in tensors):
        yield "io='float32'"
    if any(tensor.name == EMBEDS_NAME for tensor in program.outputs):
        yield "with_projector=False"
    if any(tensor.shape[-1] != contract.image_size for tensor in program.inputs):
        yield f"image_size={contract.image_size}"


def _mlx_lacks(folder: Path, contract: Contract) -> Iterator[str]:
    if not has_mlx_encoder(folder):
        yield f"{contract.title} runs MLX weights. Export again with encoder='mlx'"
        return
    found = encoder_config_of(folder)
    if contract.architecture is not None and found != contract.architecture:
        yield (
            f"{contract.title} runs only FastViTHD, with {_described(contract.architecture)} (got {_described(found)})"
        )


def _described(config: FastViTConfig) -> str:
    return f"depths {'-'.join(map(str, config.depths))} and widths {'-'.join(map(str, config.embed_dims))}"


def zip_path(out: str | Path) -> Path:
    """Returns the path of the zip file, with its suffix."""
    path = Path(out).expanduser()
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")


def all_files(folder: Path) -> list[Path]:
    """Returns every file under `folder`."""
    return [path for path in folder.rglob("*") if path.is_file()]


def source_manifest(source: Path) -> Mapping[str, Any]:
    """Returns the export's manifest. It is empty for a folder without one."""
    file = source / MANIFEST_NAME
    return read_json_object(file) if file.is_file() else {}


def check_faults(written: Path, contract: Contract) -> None:
    """Raises VerificationError if the client could not load the bundle. The cause is in the model folder."""
    faults = list(bundle_faults(written, contract))
    if faults:
        raise VerificationError(f"no bundle for {contract.name} was written: {'; '.join(faults[:MAX_LISTED])}.")


def bundle_notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the notes of the export, with one about the licence of Apple's weights."""
    found = manifest.get("notes")
    notes = [note for note in found if isinstance(note, str)] if isinstance(found, list) else []
    name = manifest.get("source", {}).get("name") if isinstance(manifest.get("source"), Mapping) else None
    if manifest.get("trained") is not False and name != "tiny":
        notes.append(LICENCE_NOTE)
    return tuple(notes)


def bundle_manifest(
    contract: Contract, manifest: Mapping[str, Any], files: Mapping[str, Any], notes: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the content of `fastvlm-bundle.json`, without dates and paths: equal folders give equal bundles."""
    return {
        "format": MANIFEST_FORMAT,
        "fastvlm": __version__,
        "target": contract.name,
        "contract": contract.source,
        "source": manifest.get("source"),
        "notes": list(notes),
        "files": files,
    }
