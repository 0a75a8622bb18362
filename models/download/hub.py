"""Checkpoints from the Hugging Face hub, through its own client: resumable, by revision, hashes checked."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..disk import check_space
from ..errors import DownloadError
from ..file_digest import sha256 as file_sha256
from .apple import check_checkpoint, check_free, work_folder
from .archives import is_needed
from .record import add_missing, missing, recorded, write_record

OnStage = Callable[[str], None]
T = TypeVar("T")

NOT_UNDERSTOOD = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the client raises over an answer of another form than a hub's: it looks at none before it reads it."""
COMMIT = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")


def download_from_hub(
    hub_id: str,
    to: Path | None = None,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    on_stage: OnStage = lambda _: None,
) -> Path:
    """Fetches the needed files of `hub_id` into the folder `to`, or into the hub's cache, and returns the folder.

    To a folder that an earlier call filled with the same revision, only files that are gone from it are added.
    `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` count, as for every client of the hub.

    Raises:
        DownloadError: there is no such checkpoint, access is not granted, the hub cannot be reached, or a file's hash
            is not what the hub says.
        OutputError: the destination is in use, or there is too little room.
    """
    on_stage(f"ask the hub about {hub_id}")
    files, commit = _asked(hub_id, revision, endpoint)
    check_checkpoint(list(files), hub_id)
    record = {"hub_id": hub_id, "commit": commit}
    filled = to is not None and recorded(to) == record
    if to is not None and filled:
        gone = missing(to, {name: size for name, (size, _) in files.items()})
        if not gone:
            on_stage(f"{to} holds this revision already")
            return to
        files = {name: files[name] for name in gone}
    needed = sum(size for size, _ in files.values())
    on_stage(f"fetch {len(files)} files, {needed / 1e6:,.0f} MB")
    if to is None:
        folder = _fetched(hub_id, commit, files, endpoint)["config.json"].parent
        _check_hashes(folder, files, on_stage)
        _note_branch(folder, revision, commit)
        return folder
    if not filled:
        check_free(to)
    check_space(to, needed)
    with work_folder(to.resolve() if filled else to) as work:
        if not filled:
            check_free(to)  # still: another download may have ended just now
        folder = work / "files"
        _fetched(hub_id, commit, files, endpoint, local_dir=folder)
        _check_hashes(folder, files, on_stage)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
        if filled:
            add_missing(folder, to, files)
            return to
        write_record(folder, record)
        if to.exists():
            to.rmdir()  # empty, as was checked
        folder.replace(to)
    return to


def _asked(hub_id: str, revision: str | None, endpoint: str | None) -> tuple[dict[str, tuple[int, str | None]], str]:
    """(size, sha256 where the hub knows it) of each needed file, and the commit that `revision` stands for."""
    from huggingface_hub import HfApi

    def ask() -> tuple[dict[str, tuple[int, str | None]], str]:
        info = HfApi(endpoint=endpoint).model_info(hub_id, revision=revision, files_metadata=True)
        files = {file.rfilename: _entry(file) for file in info.siblings or () if is_needed(file.rfilename)}
        if not COMMIT.fullmatch(str(info.sha)):  # the client makes paths of it
            raise ValueError
        return files, str(info.sha)

    return _told(hub_id, ask, begun=False)


def _entry(file: Any) -> tuple[int, str | None]:
    """Size and sha256 of a file that an answer lists. Raises ValueError for what no hub says."""
    sha256 = file.lfs.sha256 if file.lfs else None
    if type(file.size) is not int or file.size < 0 or not (sha256 is None or SHA256.fullmatch(sha256)):
        raise ValueError
    return file.size, sha256


def _fetched(
    hub_id: str, commit: str, names: Iterable[str], endpoint: str | None, local_dir: Path | None = None
) -> dict[str, Path]:
    """Where each file is now. One after another, here: `snapshot_download` has threads, which Ctrl-C would wait for."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(hub_id, name, revision=commit, local_dir=local_dir, endpoint=endpoint))

    return {name: _told(hub_id, partial(fetch, name), begun=True) for name in names}


def _note_branch(folder: Path, revision: str | None, commit: str) -> None:
    """Lets the cache know what a branch or tag stands for, as its client does; an earlier commit counts until then."""
    from huggingface_hub import constants

    ref = folder.parents[1] / "refs" / (revision or constants.DEFAULT_REVISION)
    if revision == commit or (ref.is_file() and ref.read_text() == commit):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    partial_ref = ref.with_name(f".{ref.name}.{os.getpid()}")
    partial_ref.write_text(commit)
    partial_ref.replace(ref)


def _told(hub_id: str, ask: Callable[[], T], *, begun: bool) -> T:
    """The client's answer; what it raises in one line of ours. `begun`: there may be something to go on from."""
    from huggingface_hub import errors

    transport = getattr(errors, "HTTPError", OSError)  # of whichever HTTP library the client uses
    try:
        return ask()
    except errors.GatedRepoError:
        raise DownloadError(
            f"{hub_id} is gated: accept its terms on the hub, then set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{hub_id} has no such revision: leave --revision out, or look at the hub") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{hub_id} is not on the hub, or private: check the name, or set HF_TOKEN to a token that may read it"
        ) from None
    except errors.HFValidationError as reason:
        raise DownloadError(f"{hub_id} is no hub id: {str(reason).splitlines()[0]}") from None
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"{hub_id} was not fetched: HF_HUB_OFFLINE is set, which forbids the network") from None
    except errors.LocalEntryNotFoundError:
        raise DownloadError(
            f"{hub_id}: the hub cannot be reached: check the connection, then run the same again"
        ) from None
    except errors.HfHubHTTPError as reason:
        raise DownloadError(f"{hub_id}: the hub answers: {str(reason).splitlines()[0]}") from None
    except (transport, OSError) as reason:
        if getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        cause = (str(reason) or type(reason).__name__).splitlines()[0]
        if not begun:
            raise DownloadError(
                f"{hub_id}: the hub cannot be reached ({cause}): check the connection and try again"
            ) from None
        raise DownloadError(f"{hub_id}: the transfer failed ({cause}): run the same command again to go on") from None
    except NOT_UNDERSTOOD as reason:
        raise DownloadError(
            f"{hub_id}: the hub's answer is not understood ({type(reason).__name__}): something else may have "
            "answered, as a login page or a proxy does; check the connection and HF_ENDPOINT"
        ) from None


def _check_hashes(folder: Path, files: dict[str, tuple[int, str | None]], on_stage: OnStage) -> None:
    """Raises DownloadError, and removes the file, when its size or sha256 is not what the hub says."""
    on_stage("check sizes and hashes")
    for name, (size, sha256) in files.items():
        file = folder / name
        fault = None
        if not file.is_file() or file.stat().st_size != size:
            fault = f"has {file.stat().st_size if file.is_file() else 0} bytes instead of {size}"
        elif sha256 is not None and file_sha256(file) != sha256:
            fault = f"has another sha256 than the hub says ({sha256[:12]}...)"
        if fault:
            for path in {file.resolve(), file}:  # in the cache a link to the content
                path.unlink(missing_ok=True)
            raise DownloadError(f"{name} {fault}: it was removed; run the same command again")
