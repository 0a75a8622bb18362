"""`fastvlm download`"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..models.errors import UsageError
from .progress import StageProgress, megabytes, note


def download_command(
    model_id: Annotated[
        str, typer.Argument(metavar="ID", help="A hub id (apple/FastVLM-0.5B), or an archive of Apple's (0.5b-stage3).")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write. Default: the hub's cache, or a folder named as Apple's."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the hub's.")] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="What the archive has to have; Apple publishes none.")
    ] = None,
) -> None:
    """Fetch a checkpoint; a download that was interrupted goes on where it was. Prints the folder."""
    from ..models.download.apple import download_archive
    from ..models.download.archives import FOLDERS, LICENCE_NOTE
    from ..models.download.hub import download_from_hub
    from ..models.hub_cache import HUB_ID

    if to is not None:
        to = to.expanduser()
    if model_id in FOLDERS:
        if revision is not None:
            raise UsageError(f"--revision is for the hub; {model_id} is an archive of Apple's")
        note(LICENCE_NOTE)
        folder = to or Path(FOLDERS[model_id])
        with ByteProgress() as progress:
            record = download_archive(model_id, folder, sha256=sha256, on_progress=progress)
        if record.get("already_there"):
            note(f"{folder} is there already; remove it to fetch it anew")
        elif not record["sha256_was_known"]:
            note(f"no checksum is published for it; the archive's sha256 is {record['sha256']}")
    elif HUB_ID.fullmatch(model_id):
        if sha256 is not None:
            raise UsageError("--sha256 is for archives; the hub names the hashes of its files itself")
        if model_id.lower().startswith("apple/"):
            note(LICENCE_NOTE)
        with StageProgress() as stages:
            folder = download_from_hub(model_id, to, revision, on_stage=stages)
    else:
        raise UsageError(f"{model_id} is neither a hub id (owner/name) nor one of {', '.join(FOLDERS)}")
    typer.echo(str(folder))


class ByteProgress:
    """One line on a terminal that is written anew, else a line for every tenth. Used as a context manager."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = -1.0
        self._tenth = -1

    def __call__(self, here: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * here // total
        if self._terminal and (now - self._shown > 0.2 or here == total):
            self._shown = now
            sys.stderr.write(f"\r\x1b[K  {megabytes(here)} of {megabytes(total)}")
        elif not self._terminal and tenth != self._tenth:
            self._tenth = tenth
            sys.stderr.write(f"  {megabytes(here)} of {megabytes(total)}\n")
        sys.stderr.flush()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown >= 0:
            sys.stderr.write("\n")
