"""`fastvlm generate`"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .progress import note

if TYPE_CHECKING:
    from ..runtime.generate import Generation
    from ..runtime.timings import Timings


def generate_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; `-` reads it from stdin.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", metavar="F", help="An image; repeat for several.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt. Default: the chat template's.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; above: sampled.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens at most; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; repeat for several.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end, for measurements.")] = False,
    fit: Annotated[str | None, typer.Option(help="pad or crop to a square. Default: as the model was trained.")] = None,
    vision: Annotated[str | None, typer.Option(help="coreml, reference or mlx. Default: what fits.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, token ids and timings as JSON.")] = False,
) -> None:
    """Answer a prompt about an image: text to stdout as it comes, timings to stderr."""
    from ..runtime.fastvlm import load
    from ..runtime.request import prepare

    request = prepare(
        image or None,
        sys.stdin.read() if prompt == "-" else prompt,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        fit=fit,
    )
    model = load(folder, vision=vision)
    stream = model.answer(request)
    try:
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough (`| head`); nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    if as_json:
        typer.echo(json.dumps(as_dict(stream.generation, model.notes), indent=2, ensure_ascii=False))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stderr.write(timing_lines(stream.generation.timings))
        for text in model.notes:  # last, where it is not scrolled past
            note(text)


def as_dict(generation: Generation, notes: tuple[str, ...]) -> dict[str, object]:
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "timings": generation.timings.as_dict(),
        "notes": list(notes),
    }


def timing_lines(timings: Timings) -> str:
    """TTFT with its stages, then the rate of the tokens after the first."""
    stages = ("preprocess", "encode", "project", "prefill", "sample")
    parts = "".join(f"  {stage:<11}{getattr(timings, f'{stage}_ms'):9.1f} ms\n" for stage in stages)
    rate = f"{timings.decode_tps:.1f} tokens/s after the first" if timings.decode_tps else "one token"
    return (
        f"\nTTFT {timings.ttft_ms:.1f} ms ({'cold: first call of this process' if timings.cold else 'warm'}), "
        f"{timings.prompt_tokens} prompt tokens\n{parts}"
        f"{timings.generated_tokens} tokens, {rate}; model loaded in {timings.load_ms / 1000:.1f} s\n"
    )
