"""`fastvlm generate`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.errors import FastVLMError
from . import options as given
from .interrupt import Interrupted
from .progress import note

if TYPE_CHECKING:
    from ..runtime.generate import Generation
    from ..runtime.timings import Timings


def generate_command(
    folder: given.Folder,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this question. `-` reads it from stdin.")
    ],
    image: given.Images = None,
    system: given.System = None,
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
    as_json: given.AsJson = False,
) -> None:
    """Answer a prompt about an image. Streams text to stdout, and prints timings to stderr."""
    from ..runtime.request import prepare

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
    request = prepare(image or None, given.text_from(sys.stdin) if prompt == "-" else prompt, **options)
    model = given.loaded(folder, backend, compute_units, kv_bits, verify_hashes, encoder_process)
    stream = model.engine.stream(request)
    if as_json:
        for _ in stream:
            pass
        typer.echo(json.dumps(as_dict(stream.generation, model.notes), indent=2, ensure_ascii=False))
    else:
        with given.quiet_pipe():
            show(stream)
        sys.stderr.write(timing_lines(stream.generation.timings))
        for text in model.notes:  # last, where it is not scrolled past
            note(text)


def show(pieces: Iterable[str]) -> None:
    """Prints the answer as it is generated. An error or a Ctrl-C starts a new line."""
    begun = False
    try:
        for piece in pieces:
            given.write_piece(piece)
            begun = True
    except (Interrupted, FastVLMError):
        if begun:
            given.write_piece("\n")
        raise
    given.write_piece("\n")


def as_dict(generation: Generation, notes: tuple[str, ...]) -> dict[str, object]:
    """Returns what `--json` prints."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "timings": generation.timings.as_dict(),
        "notes": list(notes),
    }


def timing_lines(timings: Timings) -> str:
    """Returns TTFT with its stages, then the rate of the tokens after the first."""
    stages = ("preprocess", "encode", "project", "prefill", "sample")
    parts = "".join(f"  {stage:<11}{getattr(timings, f'{stage}_ms'):9.1f} ms\n" for stage in stages)
    rate = f"{timings.decode_tps:.1f} tokens/s after the first" if timings.decode_tps else "one token"
    return (
        f"\nTTFT {timings.ttft_ms:.1f} ms ({'cold: first call of this process' if timings.cold else 'warm'}), "
        f"{timings.prompt_tokens} prompt tokens, {timings.reused_tokens} of them cached\n{parts}"
        f"{timings.generated_tokens} tokens, {rate}; model loaded in {timings.load_ms / 1000:.1f} s\n"
    )
