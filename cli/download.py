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
        str,
        typer.Argument(metavar="ID", help="A hub id (apple/FastVLM-0.5B), or one of Apple's archives (0.5b-stage3)."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Write this folder.",
            show_default="the hub's cache, or ./NAME for Apple's archives",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Take this branch, tag or commit from the hub.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Require this checksum of an archive. Apple publishes none.")
    ] = None,
) -> None:
    """Download a checkpoint, or resume an interrupted download. Prints the folder."""
    from ..models.download.apple import download_archive
    from ..models.download.archives import FOLDERS, LICENCE_NOTE
    from ..models.download.hub import download_from_hub
    from ..models.hub_cache import HUB_ID

    if out is not None:
        out = out.expanduser()
    if model_id in FOLDERS:
        if revision is not None:
            raise UsageError(f"revision is for hub ids, and {model_id} is an archive", "revision")
        note(LICENCE_NOTE)
        folder = out or Path(FOLDERS[model_id])
        with ByteProgress() as progress:
            record = download_archive(model_id, folder, sha256=sha256, on_progress=progress)
        if record.get("already_there"):
            note(f"{folder} exists already. Remove it to download it again")
        elif not record["sha256_was_known"]:
            note(f"Apple publishes no checksum for it. The archive's sha256 is {record['sha256']}")
    elif HUB_ID.fullmatch(model_id):
        if sha256 is not None:
            raise UsageError("sha256 is for archives. The hub has the hashes of its files", "sha256")
        if model_id.lower().startswith("apple/"):
            note(LICENCE_NOTE)
        with StageProgress() as stages:
            folder = download_from_hub(model_id, out, revision, on_stage=stages)
    else:
        raise UsageError(f"{model_id} is neither a hub id (owner/name) nor one of {', '.join(FOLDERS)}")
    typer.echo(str(folder))


class ByteProgress:
    """A context manager that prints one updated line on a terminal, or a line per tenth elsewhere."""

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
