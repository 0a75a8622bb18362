"""Exported model folders, checked against their manifest before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..models.config import FastVLMConfig
from ..models.errors import ModelFolderError
from ..models.files import is_file, read_json_object, sample_sha256, sha256
from ..models.folder_layout import (
    ASSET_NAME,
    ASSET_SYSTEMS,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    PACKAGE_NAME,
    has_mlx_encoder,
    saved_weights,
)
from ..models.hub_cache import HUB_ID, cached_folder
from ..models.safetensors_files import INDEX_NAME

if TYPE_CHECKING:
    from ..models._mlx import mx

NO_MANIFEST_NOTE = f"the folder has no {MANIFEST_NAME}: its files could not be checked"
UNTRAINED_NOTE = "the weights are not trained: the text means nothing"

MAX_LISTED_FAULTS = 4
"""The number of faults that one message lists before it says how many more there are."""

NO_SAMPLE = object()
"""The default for files whose manifest, from an older version, has no sample."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose configuration is read and whose weights are not loaded yet."""

    path: Path
    config: FastVLMConfig
    trained: bool
    """True if the weights come from training, so that the text has a meaning."""
    notes: tuple[str, ...]

    @property
    def package(self) -> Path:
        """The vision encoder's package."""
        return self.path / PACKAGE_NAME

    def weights(self) -> dict[str, mx.array]:
        """Returns the decoder's and the projector's tensors, memory-mapped (`models.folder_layout.saved_weights`)."""
        return saved_weights(self.path)


def open_folder(path: str | Path, *, verify_hashes: bool = False) -> ModelFolder:
    """Returns the model folder at `path`, which may also be the hub id of an exported folder in the hub's cache.

    Sizes and samples of the files are always compared with the manifest, so parts of different exports are never mixed.
    `verify_hashes` compares every byte, which takes about a second per gigabyte.

    Raises:
        ModelFolderError: the folder is missing or incomplete, or its files differ from the manifest.
        ConfigError: `config.json` is malformed.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        path = cached_folder(str(path)) or path  # an exported folder on the hub, such as apple/FastVLM-0.5B-fp16
    if not path.is_dir():
        raise ModelFolderError(_not_a_folder(str(path)))
    manifest = read_json_object(path / MANIFEST_NAME, ModelFolderError) if (path / MANIFEST_NAME).is_file() else None
    if manifest is not None:
        _check_files(path, manifest, verify_hashes)
    elif verify_hashes:
        raise ModelFolderError(f"{path}: no {MANIFEST_NAME} to verify its files with. Export the model again.")
    has_encoder = (path / PACKAGE_NAME).is_dir() or has_mlx_encoder(path)
    if not has_encoder and (path / ASSET_NAME).is_dir():
        raise ModelFolderError(
            f"{path}: its only encoder is {ASSET_NAME}, which apps run on {ASSET_SYSTEMS}, and fastvlm does not. "
            "Export it with format='both' to run it here.",
            "format",
        )
    if not (path / CONFIG_NAME).is_file() or not has_encoder:
        missing = PACKAGE_NAME if (path / CONFIG_NAME).is_file() else CONFIG_NAME
        raise ModelFolderError(f"{path} is not a model folder: it has no {missing}. Make one with `fastvlm export`.")
    generation = path / GENERATION_CONFIG_NAME
    config = FastVLMConfig.from_dict(
        read_json_object(path / CONFIG_NAME), read_json_object(generation) if generation.is_file() else None
    )
    trained = manifest is None or manifest.get("trained") is not False
    return ModelFolder(path, config, trained, _notes(manifest, trained))


def _not_a_folder(name: str) -> str:
    """Returns an error for a name that is not a folder, with the command that makes one."""
    from ..models.download.archives import FOLDERS
    from ..models.references import TINY

    if name == TINY or name.startswith("random:"):
        return f"{name} is a MODEL to export, not a folder. Run `fastvlm export {name} -o model`, then name `model`."
    if HUB_ID.fullmatch(name) or name in FOLDERS:
        return (
            f"{name} is neither a folder here nor in the hub's cache. Fetch it with `fastvlm download {name}`, then "
            "make a model folder of it with `fastvlm export`, unless it is an exported one."
        )
    return f"{name} is not a folder. Make a model folder with `fastvlm export`."


def _notes(manifest: Mapping[str, Any] | None, trained: bool) -> tuple[str, ...]:
    if manifest is None:
        return (NO_MANIFEST_NOTE,)
    recorded = manifest.get("notes")
    notes = tuple(note for note in recorded if isinstance(note, str)) if isinstance(recorded, list) else ()
    return notes or (() if trained else (UNTRAINED_NOTE,))


def _check_files(path: Path, manifest: Mapping[str, Any], verify_hashes: bool) -> None:
    """Raises ModelFolderError unless every file of the manifest exists with its size and content."""
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ModelFolderError(
            f"{path / MANIFEST_NAME}: the format must be {MANIFEST_FORMAT} (got {manifest.get('format')!r:.40}). "
            "Export the model again, or update fastvlm."
        )
    files = manifest.get("files")
    if not isinstance(files, Mapping):
        raise ModelFolderError(f"{path / MANIFEST_NAME} lists no files. Export the model again.")
    faults = list(_file_faults(path, files, verify_hashes))
    if faults:
        more = f" and {len(faults) - MAX_LISTED_FAULTS} more" if len(faults) > MAX_LISTED_FAULTS else ""
        raise ModelFolderError(
            f"{path} does not match its manifest: {', '.join(faults[:MAX_LISTED_FAULTS])}{more}. Copy it again, or "
            "export the model again."
        )


def _file_faults(path: Path, files: Mapping[str, Any], verify_hashes: bool) -> Iterator[str]:
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield f"{name!r:.80} is outside the folder"
            continue
        listed = entry if isinstance(entry, Mapping) else {}
        file = path / name
        if not is_file(file):
            yield f"{name:.200} is missing"
        elif file.stat().st_size != listed.get("bytes"):
            yield f"{name} has {file.stat().st_size} bytes instead of {listed.get('bytes')!r:.40}"
        elif listed.get("sample_sha256", NO_SAMPLE) not in (NO_SAMPLE, sample_sha256(file)):
            yield f"{name} is from another export, or damaged"
        elif verify_hashes and listed.get("sha256") != sha256(file):
            yield f"{name} has another sha256"
    if INDEX_NAME not in files and is_file(path / INDEX_NAME):  # the index decides which weights are read
        yield f"{INDEX_NAME} is from another export"
