"""Output folders that are absent or complete: written next to their destination, then renamed."""

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
from ..models.foreign_files import has_content

FULL_BELOW_BYTES = 8 * 2**20
"""The free space below which a failed write is reported as a full disk. Native writers fail before the last byte."""

_being_written: set[Path] = set()
"""The partial folders that this process is writing."""


@contextlib.contextmanager
def new_folder(
    destination: Path,
    *,
    force: bool,
    check: Callable[[Path], None] | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    workplace: Path | None = None,
) -> Iterator[Path]:
    """Yields a temporary folder that gets the name `destination` if the block succeeds, and is removed otherwise.

    Args:
        check: a function in place of `check_destination`. `check(destination)` raises if something is in the way.
        finish: a function in place of `publish`. `finish(partial, destination)` gives the folder its name.
        workplace: the folder to write in, if it exists on the same file system. The default is the destination's.

    Raises:
        OutputError: the destination exists (without `force`), cannot be written, or the disk is full.
    """
    # `m/gone/../../m` would be another place once folders on the way are made.
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow a link at the end
    check = check or functools.partial(check_destination, force=force)
    check(destination)
    workplace = _workplace(destination, workplace)
    partial = workplace / f".{destination.name}.partial-{os.getpid()}"
    if partial in _being_written:
        raise OutputError(f"{destination} is being written by this process. Wait for it, or choose another folder.")
    _being_written.add(partial)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        for place in {destination.parent, workplace}:
            remove_abandoned(destination, place)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):  # some writers make files that only their owner may read
            path.chmod(0o777 & ~_umask() if path.is_dir() else 0o666 & ~_umask())
        check(destination)  # another export may have finished meanwhile
        (finish or publish)(partial, destination)
    except OSError as reason:
        if reason.filename is not None and not is_output(Path(reason.filename), partial):
            raise  # the error is about an input file
        raise output_error(reason, destination) from reason
    except Exception as reason:
        # Native writers (coremltools, safetensors) report a full disk with various messages, or with none.
        if partial.exists() and shutil.disk_usage(partial).free < FULL_BELOW_BYTES:
            raise output_error(OSError(errno.ENOSPC, ""), destination) from reason
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _being_written.discard(partial)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raises OutputError if `destination` is in the way, before any work is done."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(f"{destination} exists and is not a folder. Choose another output folder.")
    if destination.is_dir() and has_content(destination):
        if not force:
            raise OutputError(
                f"{destination} exists. Pass force=True to overwrite it, or choose another output folder.", "force"
            )
        if not (destination / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{destination} was not written by fastvlm (no {MANIFEST_NAME}), so force=True does not overwrite it. "
                "Choose another output folder.",
                "force",
            )


def publish(partial: Path, destination: Path) -> None:
    """Gives the finished folder its name. A folder that it replaces is removed only after that."""
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
    """Returns the folder to write in: `asked`, if a folder in it can be renamed to `destination`."""
    if asked is not None and asked.is_dir() and destination.parent.is_dir():
        asked = Path(os.path.abspath(asked))  # noqa: PTH100 - as for the destination
        if asked.stat().st_dev == destination.parent.stat().st_dev:
            return asked
    return destination.parent


def remove_abandoned(destination: Path, workplace: Path | None = None) -> None:
    """Removes what killed processes left for the same destination. One killed between two renames is undone.

    In a container every process may get the same id, so a leftover with the id of this process is removed too.
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
    """Returns True for a path in the partial folder, or on the way to it."""
    return partial in (path, *path.parents) or path in partial.parents


def output_error(reason: OSError, destination: Path) -> OutputError:
    """Returns the one-line error for a failed write."""
    if reason.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return OutputError(
            f"{destination} exists: another process wrote it meanwhile. Pass force=True to overwrite it.", "force"
        )
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{destination} was not written: the disk is full. Free some space, or choose another disk.")
    return OutputError(f"{destination} cannot be written ({reason.strerror or reason}).")


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
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
