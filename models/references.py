"""MODEL: a checkpoint folder, `tiny` (the trained checkpoint in the package) or `random:SIZE`."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoint import Checkpoint, FolderCheckpoint
from .errors import ModelReferenceError

DEFAULT_MODEL = TINY = "tiny"
TINY_FOLDER = Path(__file__).with_name("tiny") / "checkpoint"


def open_checkpoint(reference: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """The checkpoint that MODEL names, with the LoRA adapter in the folder `adapter` merged into it.

    Raises:
        ModelReferenceError: nothing of that name can be opened.
        CheckpointError: the folder is there, but is no checkpoint that can be read, or the adapter is not for it.
    """
    checkpoint = _open(reference)
    if adapter is None:
        return checkpoint
    from .adapter import AdaptedCheckpoint

    return AdaptedCheckpoint(checkpoint, Path(adapter).expanduser())


def _open(reference: str | Path) -> Checkpoint:
    from .random_checkpoint import DECODERS, RandomCheckpoint  # brings numpy, which no start-up needs

    text = str(reference)
    if text.startswith("random:"):
        return RandomCheckpoint(text.removeprefix("random:").lower())
    if text == TINY:
        return FolderCheckpoint(TINY_FOLDER, name=TINY)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return FolderCheckpoint(folder)
    if folder.exists():
        raise ModelReferenceError(
            f"{folder} is a file; MODEL should be the folder that holds config.json and *.safetensors"
        )
    known = ", ".join([TINY, *(f"random:{size}" for size in DECODERS)])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ModelReferenceError(
            f"{text} is not a folder here. If it is a hub id, fetch it first: `hf download {text} --local-dir DIR`; "
            f"without a checkpoint, try {known}"
        )
    raise ModelReferenceError(f"{text} is neither a folder nor one of {known}")
