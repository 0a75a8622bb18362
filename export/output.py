"""Output that is absent or whole: written beside its destination, then renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..models.errors import OutputError
from ..models.folder_layout import MANIFEST_NAME

FULL_BELOW_BYTES = 8 * 2**20
"""With less than this left, a failed write is put down to the disk: native writers fail before the last byte."""

_being_written: set[Path] = set()
"""Partial folders of this process."""


@contextlib.contextmanager
def new_folder(
    destination: Path,
    *,
    force: bool,
    check: Callable[[Path], None] | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    workplace: Path | None = None,
) -> Iterator[Path]:
    """A temporary folder next to `destination` that takes its name when the block ends well, and is removed otherwise.

    It is in the folder `workplace` instead, where that exists and is on the same file system.

    `check(destination)`, in place of `check_destination`, raises when something is in the way;
    `finish(partial, destination)`, in place of `publish`, gives what was written its name.

    Raises:
        OutputError: the destination exists (without `force`), cannot be written, or the disk is full.
    """
    # `m/gone/../../m` would name another place once folders are made on the way.
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow a link at the end
    check = check or functools.partial(check_destination, force=force)
    check(destination)
    workplace = _workplace(destination, workplace)
    partial = workplace / f".{destination.name}.partial-{os.getpid()}"
    if partial in _being_written:
        raise OutputError(f"{destination} is being written by this process: wait for it, or choose another folder")
    _being_written.add(partial)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        for place in {destination.parent, workplace}:
            remove_abandoned(destination, place)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):  # some writers make files that only their owner can read
            path.chmod(0o777 & ~_umask() if path.is_dir() else 0o666 & ~_umask())
        check(destination)  # another export may have finished meanwhile
        (finish or publish)(partial, destination)
    except OSError as reason:
        if reason.filename is not None and not is_output(Path(reason.filename), partial):
            raise  # of a file that was read
        raise output_error(reason, destination) from reason
    except Exception as reason:
        # Writers in native code (coremltools', safetensors') tell of a full disk in many words, or not at all.
        if partial.exists() and shutil.disk_usage(partial).free < FULL_BELOW_BYTES:
            raise output_error(OSError(errno.ENOSPC, ""), destination) from reason
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _being_written.discard(partial)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raises OutputError when `destination` is in the way: before any work is done for it."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(f"{destination} exists and is no folder: choose another output folder")
    if destination.is_dir() and any(destination.iterdir()):
        if not force:
            raise OutputError(
                f"{destination} exists: pass --force (force=True) to replace it, or choose another output folder"
            )
        if not (destination / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{destination} was not written by fastvlm (no {MANIFEST_NAME} in it), so --force will not replace it: "
                "choose another output folder"
            )


def publish(partial: Path, destination: Path) -> None:
    """Gives the finished folder its name; a folder that it replaces goes only after that."""
    if not destination.exists():
        partial.rename(destination)
        return
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    destination.rename(replaced)
    try:
        partial.rename(destination)
    except BaseException:  # Ctrl-C too
        if not destination.exists():
            replaced.rename(destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _workplace(destination: Path, asked: Path | None) -> Path:
    """The folder to write in: the one asked for, if what is written there can be renamed to `destination`."""
    if asked is not None and asked.is_dir() and destination.parent.is_dir():
        asked = Path(os.path.abspath(asked))  # noqa: PTH100 - as for the destination
        if asked.stat().st_dev == destination.parent.stat().st_dev:
            return asked
    return destination.parent


def remove_abandoned(destination: Path, workplace: Path | None = None) -> None:
    """Removes what killed runs left for the same destination; one killed between two renames is undone.

    A container gives each run the same process id: what bears ours is a killed run's, too.
    """
    for kind in ("replaced", "partial"):
        for folder in (workplace or destination.parent).glob(f".{glob.escape(destination.name)}.{kind}-*"):
            pid = folder.name.rpartition("-")[2]
            if not pid.isdigit() or (_is_running(int(pid)) and int(pid) != os.getpid()) or not folder.is_dir():
                continue
            if kind == "replaced" and not destination.exists():
                folder.rename(destination)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def is_output(path: Path, partial: Path) -> bool:
    """Whether a path lies in the partial folder, or on the way to it."""
    return partial in (path, *path.parents) or path in partial.parents


def output_error(reason: OSError, destination: Path) -> OutputError:
    if reason.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return OutputError(
            f"{destination} exists: another process wrote it meanwhile; pass --force (force=True) to replace it"
        )
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {destination} was not written; free some space or choose another disk")
    return OutputError(f"{destination} cannot be written: {reason.strerror or reason}")


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
