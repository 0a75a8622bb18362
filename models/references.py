"""The values of MODEL: a checkpoint folder, a downloaded hub id, `tiny` (in the package), `random:SIZE`."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, FolderCheckpoint
from .download.archives import FOLDERS
from .errors import CheckpointError, ModelReferenceError
from .hub_cache import HUB_ID, cached_folder

DEFAULT_MODEL = TINY = "tiny"
TINY_FOLDER = Path(__file__).with_name("tiny") / "checkpoint"


def open_checkpoint(reference: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """Opens the checkpoint that `reference` names, with the LoRA adapter in the folder `adapter` merged into it.

    Raises:
        ModelReferenceError: the reference matches nothing.
        CheckpointError: the folder is not a readable checkpoint, or the adapter belongs to another.
    """
    checkpoint = _open(reference)
    if adapter is None:
        return checkpoint
    from .adapter import AdaptedCheckpoint

    return AdaptedCheckpoint(checkpoint, Path(adapter).expanduser())


def _open(reference: str | Path) -> Checkpoint:
    from .random_checkpoint import DECODERS, RandomCheckpoint  # imports numpy, which the start-up does not need

    text = str(reference)
    if text.startswith("random:"):
        return RandomCheckpoint(text.removeprefix("random:").lower())
    if text == TINY:
        return FolderCheckpoint(TINY_FOLDER, name=TINY)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return FolderCheckpoint(folder)
    if folder.exists():
        raise ModelReferenceError(f"{folder} is a file. Pass the folder with config.json and *.safetensors.")
    known = ", ".join([TINY, *(f"random:{size}" for size in DECODERS)])
    if HUB_ID.fullmatch(text):
        cached = cached_folder(text)
        if cached is not None:
            return _cached_checkpoint(text, cached)
        raise ModelReferenceError(
            f"{text} is neither a folder nor in the hub's cache. Run `fastvlm download {text}`. "
            f"Without a download, try {known}."
        )
    if text in FOLDERS:
        raise ModelReferenceError(
            f"{text} is not downloaded. Run `fastvlm download {text}`, and pass the folder that it prints."
        )
    raise ModelReferenceError(f"{text} is neither a folder nor one of {known}")


def _cached_checkpoint(hub_id: str, folder: Path) -> Checkpoint:
    """Opens a checkpoint in the hub's cache. Raises CheckpointError with the command that completes it."""
    try:
        return FolderCheckpoint(folder, name=hub_id.rpartition("/")[2])
    except CheckpointError as reason:
        raise type(reason)(f"{reason} (if the download is incomplete, run `fastvlm download {hub_id}`)") from reason
