"""Downloads checkpoints from the Hugging Face hub with its own client: resumable, by revision, hashes checked."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DownloadError
from ..files import check_space
from ..files import sha256 as file_sha256
from .archives import is_needed
from .destination import (
    add_missing,
    check_checkpoint,
    check_free,
    missing_files,
    publish,
    read_record,
    work_folder,
    write_record,
)

OnStage = Callable[[str], None]
"""Called with the name of each stage when it begins."""
HubFiles = dict[str, tuple[int, str | None]]
"""The size in bytes and the sha256, if the hub has one, of each file by name."""
T = TypeVar("T")

MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""The client's errors for an answer that no hub sends. The client does not validate answers before it reads them."""
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
    """Downloads the needed files of `hub_id` into the folder `to`, or into the hub's cache, and returns the folder.

    In a folder that an earlier call filled with the same revision, only missing files are added. `HF_TOKEN`,
    `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` work as in every client of the hub.

    Raises:
        DownloadError: the checkpoint does not exist, access is not granted, the hub cannot be reached, or a file has
            another hash than on the hub.
        OutputError: the destination is in use, or there is not enough disk space.
    """
    on_stage(f"ask the hub about {hub_id}")
    files, commit = _list_files(hub_id, revision, endpoint)
    check_checkpoint(list(files), hub_id)
    record = {"hub_id": hub_id, "commit": commit}
    filled = to is not None and read_record(to) == record
    if to is not None and filled:
        missing = missing_files(to, {name: size for name, (size, _) in files.items()})
        if not missing:
            on_stage(f"{to} already has this revision")
            return to
        files = {name: files[name] for name in missing}
    needed = sum(size for size, _ in files.values())
    on_stage(f"fetch {len(files)} files, {needed / 1e6:,.0f} MB")
    if to is None:
        folder = _download_files(hub_id, commit, files, endpoint)["config.json"].parent
        _check_hashes(folder, files, on_stage)
        _note_branch(folder, revision, commit)
        return folder
    if not filled:
        check_free(to)
    check_space(to, needed)
    with work_folder(to.resolve() if filled else to) as work:
        if not filled:
            check_free(to)  # again, because another download may have finished before the lock
        folder = work / "files"
        _download_files(hub_id, commit, files, endpoint, local_dir=folder)
        _check_hashes(folder, files, on_stage)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
        if filled:
            add_missing(folder, to, files)
            return to
        write_record(folder, record)
        publish(folder, to)
    return to


def _list_files(hub_id: str, revision: str | None, endpoint: str | None) -> tuple[HubFiles, str]:
    """Returns the needed files and the commit of `revision`."""
    from huggingface_hub import HfApi

    def ask() -> tuple[HubFiles, str]:
        info = HfApi(endpoint=endpoint).model_info(hub_id, revision=revision, files_metadata=True)
        files = {file.rfilename: _entry(file) for file in info.siblings or () if is_needed(file.rfilename)}
        if not COMMIT.fullmatch(str(info.sha)):  # the client uses it in paths
            raise ValueError
        return files, str(info.sha)

    return _call_hub(hub_id, ask, resumable=False)


def _entry(file: Any) -> tuple[int, str | None]:
    """Returns size and sha256 of a file in the hub's answer. Raises ValueError if they are invalid."""
    sha256 = file.lfs.sha256 if file.lfs else None
    if type(file.size) is not int or file.size < 0 or not (sha256 is None or SHA256.fullmatch(sha256)):
        raise ValueError
    return file.size, sha256


def _download_files(
    hub_id: str, commit: str, names: Iterable[str], endpoint: str | None, local_dir: Path | None = None
) -> dict[str, Path]:
    """Downloads the files one by one and returns their paths. Ctrl-C would wait for `snapshot_download`'s threads."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(hub_id, name, revision=commit, local_dir=local_dir, endpoint=endpoint))

    return {name: _call_hub(hub_id, partial(fetch, name), resumable=True) for name in names}


def _note_branch(folder: Path, revision: str | None, commit: str) -> None:
    """Writes the commit of a branch or tag into the cache, like the client. An earlier commit is valid until then."""
    from huggingface_hub import constants

    ref = folder.parents[1] / "refs" / (revision or constants.DEFAULT_REVISION)
    if revision == commit or (ref.is_file() and ref.read_text() == commit):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    partial_ref = ref.with_name(f".{ref.name}.{os.getpid()}")
    partial_ref.write_text(commit)
    partial_ref.replace(ref)


def _call_hub(hub_id: str, ask: Callable[[], T], *, resumable: bool) -> T:
    """Returns the client's answer, and converts its errors to one line. `resumable` adds how to resume."""
    from huggingface_hub import errors

    transport = getattr(errors, "HTTPError", OSError)  # depends on the client's HTTP library
    try:
        return ask()
    except errors.GatedRepoError:
        raise DownloadError(
            f"{hub_id}: is gated. Accept its terms on the hub, then set HF_TOKEN to your token."
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(
            f"{hub_id}: does not have this branch, tag or commit. Leave revision out, or look it up on the hub.",
            "revision",
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{hub_id}: not found on the hub, or private. Check the name, or set HF_TOKEN to a token that may read it."
        ) from None
    except errors.HFValidationError as reason:
        raise DownloadError(f"{hub_id}: is not a hub id ({str(reason).splitlines()[0]})") from None
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"{hub_id}: not downloaded, because HF_HUB_OFFLINE is set") from None
    except errors.LocalEntryNotFoundError:
        raise DownloadError(
            f"{hub_id}: the hub cannot be reached. Check the connection, then run the command again."
        ) from None
    except errors.HfHubHTTPError as reason:
        raise DownloadError(f"{hub_id}: the hub answered: {str(reason).splitlines()[0]}") from None
    except (transport, OSError) as reason:
        if getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        cause = (str(reason) or type(reason).__name__).splitlines()[0]
        if not resumable:
            raise DownloadError(
                f"{hub_id}: the hub cannot be reached ({cause}). Check the connection and try again."
            ) from None
        raise DownloadError(f"{hub_id}: the transfer failed ({cause}). Run the command again to resume.") from None
    except MALFORMED as reason:
        raise DownloadError(
            f"{hub_id}: the hub's answer is malformed ({type(reason).__name__}). A login page or a proxy may have "
            "answered. Check the connection and HF_ENDPOINT."
        ) from None


def _check_hashes(folder: Path, files: HubFiles, on_stage: OnStage) -> None:
    """Raises DownloadError and removes the file if its size or sha256 differs from the hub's."""
    on_stage("check sizes and hashes")
    for name, (size, sha256) in files.items():
        file = folder / name
        fault = None
        if not file.is_file() or file.stat().st_size != size:
            fault = f"must have {size} bytes, got {file.stat().st_size if file.is_file() else 0}"
        elif sha256 is not None and file_sha256(file) != sha256:
            fault = f"has another sha256 than on the hub ({sha256[:12]}...)"
        if fault:
            for path in {file.resolve(), file}:  # in the cache, a link and its target
                path.unlink(missing_ok=True)
            raise DownloadError(f"{name}: {fault}. It was removed. Run the command again.")
