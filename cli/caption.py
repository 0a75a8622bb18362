"""`fastvlm caption`: a caption for every image of a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as given
from .interrupt import Interrupted
from .progress import CountProgress, LoadProgress, note, one_line

if TYPE_CHECKING:
    from ..runtime.captions import Captions
    from ..runtime.fastvlm import FastVLM


def caption_command(
    images: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images, with its subfolders.")],
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="FOLDER", help="An exported model folder, or its hub id.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Write JSON lines to FILE. If it exists, the run is resumed."),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this about each image. `-` reads stdin.")
    ] = given.DESCRIBE,
    system: given.System = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Decode N answers at a time.")] = 8,
    max_tokens: given.MaxTokens = 256,
    temperature: given.Temperature = 0.0,
    top_p: given.TopP = 1.0,
    top_k: given.TopK = 0,
    min_p: given.MinP = 0.0,
    repetition_penalty: given.RepetitionPenalty = 1.0,
    seed: given.Seed = None,
    stop: given.Stop = None,
    ignore_eos: given.IgnoreEos = False,
    num_beams: given.NumBeams = 1,
    length_penalty: given.LengthPenalty = 1.0,
    early_stopping: given.EarlyStopping = "false",
    json_schema: given.JsonSchema = None,
    choice: given.Choice = None,
    regex: given.Regex = None,
    grammar: given.Grammar = None,
    fit: given.Fit = None,
    background: given.Background = "white",
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    encoder_process: given.EncoderProcess = False,
    kv_bits: given.KVBits = None,
    verify_hashes: given.VerifyHashes = False,
) -> None:
    """Caption every image of a folder into a JSON Lines file. Exits with 1 if an image has no caption."""
    from ..runtime.captions import CaptionFile, Captions, run_digest
    from ..runtime.fastvlm import load
    from ..runtime.request import prepare
    from .outputs import check_outputs

    options: dict[str, Any] = {
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
        "fit": fit,
        "background": background,
        **given.beams(num_beams, length_penalty, early_stopping),
        **given.structure(json_schema, choice, regex, grammar),
    }
    question = given.text_from(sys.stdin) if prompt == "-" else prompt
    prepare(None, question, **options)  # wrong options are reported before anything is written
    check_outputs(out)
    with CaptionFile(out, run_digest(model, question, options)) as file:
        captions = Captions(images, question, file, options)
        if captions.waiting:
            with LoadProgress() as progress:
                vlm = load(
                    model,
                    backend,
                    compute_units=compute_units,
                    kv_bits=given.as_int(kv_bits),
                    verify_hashes=verify_hashes,
                    encoder_process=encoder_process,
                    on_wait=progress,
                )
            write(captions, vlm, batch_size)
            for text in vlm.notes:
                note(text)
        there = captions.total - len(captions.waiting)
        known = f", {there:,} of them from an earlier run" if there else ""
        sys.stderr.write(f"{captions.total:,} images in {out}{known}\n")
        if captions.failures:
            note(
                f"{captions.failures:,} of {captions.total:,} images have no caption, and their lines an error. "
                "Remove those lines to try them again"
            )
            raise typer.Exit(1)


def write(captions: Captions, vlm: FastVLM, batch_size: int) -> None:
    """Writes the missing lines. After a Ctrl-C it says how to resume."""
    written = 0
    try:
        with CountProgress(len(captions.waiting), "images") as progress:
            for captioned in captions.write(vlm, batch_size):
                written += 1
                if captioned.error:
                    progress.say(f"  {one_line(captioned.file)}: {one_line(captioned.error)}")
                progress.advance(f"{captions.failures:,} failed" if captions.failures else "")
    except Interrupted:
        note(f"{written:,} of {len(captions.waiting):,} images done. The same command resumes from there")
        raise
