"""The place of a trained checkpoint: what is there is replaced only if training wrote it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError

REPORT_NAME = "training.json"
"""Written first, so that whatever a killed run leaves can be told from other people's files."""


def free_place(checkpoint: Path) -> None:
    """Looks at what is there, and gives back its name to a checkpoint that a killed run had moved away.

    Raises:
        UsageError: something at `checkpoint`, or at a name that is used on the way there, was not written by training.
    """
    partial, replaced = on_the_way(checkpoint)
    for path in (checkpoint, partial, replaced):
        if not (path.exists() or path.is_symlink()) or _is_ours(path):
            continue
        raise UsageError(
            f"{path} was not written by training (no {REPORT_NAME} in it), so it will not be replaced: "
            "move it away, or choose another --out"
        )
    if replaced.exists() and not checkpoint.exists():
        replaced.rename(checkpoint)


@contextlib.contextmanager
def in_place_of(checkpoint: Path) -> Iterator[Path]:
    """A folder to write, first of all its `training.json`; it takes the name `checkpoint` when the block ends well.

    An earlier checkpoint is removed only after that. Raises UsageError, see `free_place`.
    """
    free_place(checkpoint)
    partial, replaced = on_the_way(checkpoint)
    for left in (partial, replaced):  # by a run that was killed
        _remove(left)
    partial.mkdir()
    yield partial
    free_place(checkpoint)
    if checkpoint.exists():
        checkpoint.rename(replaced)
    try:
        partial.rename(checkpoint)
    except BaseException:  # Ctrl-C too
        if replaced.exists() and not checkpoint.exists():
            replaced.rename(checkpoint)
        raise
    _remove(replaced)


def on_the_way(checkpoint: Path) -> tuple[Path, Path]:
    """Where a new checkpoint is written, and where an earlier one waits meanwhile."""
    return checkpoint.with_name(f"{checkpoint.name}.partial"), checkpoint.with_name(f"{checkpoint.name}.replaced")


def _is_ours(path: Path) -> bool:
    """Whether it is a folder that training wrote, or an empty one."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / REPORT_NAME).is_file() or not any(path.iterdir())


def _remove(folder: Path) -> None:
    """`training.json` last: a run that is killed here leaves a folder that the next one knows for training's."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != REPORT_NAME:
            path.unlink()
    shutil.rmtree(folder)
