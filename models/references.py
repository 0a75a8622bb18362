"""The values of MODEL: a checkpoint folder, a downloaded hub id, `tiny` (in the package), `random:SIZE`."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, FolderCheckpoint
from .download.archives import FOLDERS
from .errors import CheckpointError, ModelReferenceError
from .foreign_files import foreign_file
from .hub_cache import HUB_ID, cached_folder

DEFAULT_MODEL = TINY = "tiny"
TINY_FOLDER = Path(__file__).with_name("tiny") / "checkpoint"


def open_checkpoint(
    reference: str | Path,
    adapter: str | Path | None = None,
    *,
    base: str | Path | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Opens the checkpoint that `reference` names, with the LoRA adapter in the folder `adapter` merged into it.

    `base` is the checkpoint that has what the folder `reference` lacks, such as everything but the projector after
    LLaVA's first stage. `allow_pickle` also reads `.bin` files, in a process of their own.

    Raises:
        ModelReferenceError: the reference matches nothing.
        CheckpointError: the folder is not a readable checkpoint, or the adapter belongs to another.
    """
    checkpoint = _open(reference if base is None else base, allow_pickle)
    parts = [Path(part).expanduser() for part in (reference if base is not None else None, adapter) if part is not None]
    if not parts:
        return checkpoint
    from .adapter import AdaptedCheckpoint

    for part in parts:
        checkpoint = AdaptedCheckpoint(checkpoint, part, allow_pickle=allow_pickle)
    return checkpoint


def _open(reference: str | Path, allow_pickle: bool) -> Checkpoint:
    from .random_checkpoint import DECODERS, RandomCheckpoint  # imports numpy, which the start-up does not need

    text = str(reference)
    if text.startswith("random:"):
        return RandomCheckpoint(text.removeprefix("random:").lower())
    if text == TINY:
        return FolderCheckpoint(TINY_FOLDER, name=TINY)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return FolderCheckpoint(folder, allow_pickle=allow_pickle)
    if folder.exists():
        foreign = foreign_file(folder)
        raise ModelReferenceError(
            f"{folder} is {foreign}"
            if foreign
            else f"{folder} is a file. Pass the folder with config.json and *.safetensors."
        )
    known = ", ".join([TINY, *(f"random:{size}" for size in DECODERS)])
    if HUB_ID.fullmatch(text):
        cached = cached_folder(text)
        if cached is not None:
            return _cached_checkpoint(text, cached, allow_pickle)
        raise ModelReferenceError(
            f"{text} is neither a folder nor in the hub's cache. Run `fastvlm download {text}`. "
            f"Without a download, try {known}."
        )
    if text in FOLDERS:
        raise ModelReferenceError(
            f"{text} is not downloaded. Run `fastvlm download {text}`, and pass the folder that it prints."
        )
    raise ModelReferenceError(f"{text} is neither a folder nor one of {known}")


def _cached_checkpoint(hub_id: str, folder: Path, allow_pickle: bool) -> Checkpoint:
    """Opens a checkpoint in the hub's cache. Raises CheckpointError with the command that completes it."""
    try:
        return FolderCheckpoint(folder, name=hub_id.rpartition("/")[2], allow_pickle=allow_pickle)
    except CheckpointError as reason:
        raise type(reason)(
            f"{reason} (if the download is incomplete, run `fastvlm download {hub_id}`)", *reason.arguments
        ) from reason
