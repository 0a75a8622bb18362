"""`fastvlm generate --images DIR`: a caption for every image of a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .interrupt import Interrupted
from .progress import CountProgress, note, one_line

if TYPE_CHECKING:
    from ..runtime.captions import Captions
    from ..runtime.fastvlm import FastVLM


def caption_folder(
    model: Path,
    load: Callable[[], FastVLM],
    images: Path,
    prompt: str,
    out: Path,
    options: Mapping[str, Any],
    batch_size: int,
) -> None:
    """Writes the lines that are missing, shows how far it is, and exits with 1 when an image failed."""
    from ..runtime.captions import CaptionFile, Captions, run_digest
    from ..runtime.request import prepare
    from .outputs import check_outputs

    prepare(None, prompt, **options)  # what is wrong with the options is told before anything is written
    check_outputs(out)
    with CaptionFile(out, run_digest(model, prompt, options)) as file:
        captions = Captions(images, prompt, file, options)
        if captions.waiting:
            vlm = load()
            write(captions, vlm, batch_size)
            for text in vlm.notes:
                note(text)
        there = captions.total - len(captions.waiting)
        known = f", {there:,} of them from an earlier run" if there else ""
        sys.stderr.write(f"{captions.total:,} images in {out}{known}\n")
        if captions.failures:
            note(
                f"{captions.failures:,} of {captions.total:,} images have no caption: their lines hold an error. "
                "Remove those lines to try them again"
            )
            raise typer.Exit(1)


def write(captions: Captions, vlm: FastVLM, batch_size: int) -> None:
    """The lines that are missing; after a Ctrl-C, how to go on."""
    written = 0
    try:
        with CountProgress(len(captions.waiting), "images") as progress:
            for captioned in captions.write(vlm, batch_size):
                written += 1
                if captioned.error:
                    progress.say(f"  {one_line(captioned.file)}: {one_line(captioned.error)}")
                progress.advance(f"{captions.failures:,} failed" if captions.failures else "")
    except Interrupted:
        note(f"{written:,} of {len(captions.waiting):,} images done: the same command goes on from there")
        raise
