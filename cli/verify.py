"""`fastvlm verify`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.float32 import disable_tf32
from . import options as given
from .progress import StageProgress

if TYPE_CHECKING:
    from ..export.verify import Verification


def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="Compare with this checkpoint.")],
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Merge this LoRA adapter into the checkpoint first.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare on the images in DIR.", show_default="embedded drawings")
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Run a folder's package and decoder, and compare them with the checkpoint. Exits with 1 if they fall short."""
    disable_tf32()
    from ..export.verify import verify

    with StageProgress() as progress:
        result = verify(folder, against, adapter=adapter, images=images, on_stage=progress)
    if as_json:
        typer.echo(json.dumps({"passed": result.passed, "failures": result.failures, **result.as_dict()}, indent=2))
    else:
        typer.echo(summary(result))
    raise typer.Exit(0 if result.passed else 1)


def summary(result: Verification) -> str:
    """Returns the table of a verification."""
    rows = (
        ("image_features", result.encoder.output, result.encoder_floor_db),
        ("logits", result.decoder.logits, result.decoder_floor_db),
    )
    lines = [f"{'':16}{'SNR':>9}{'floor':>9}{'worst row':>11}{'cosine':>10}"]
    lines += [
        f"{what:16}{agreement.snr_db:6.1f} dB{floor:6.0f} dB{agreement.worst_row_snr_db:8.1f} dB"
        f"{agreement.cosine:10.6f}"
        for what, agreement, floor in rows
    ]
    stages = ", ".join(f"{stage} {snr_db:.0f}" for stage, snr_db in result.encoder.stages.items())
    lines += [
        f"stages, dB: {stages}",
        answer(result),
        f"weights compared: {result.encoder.weights.count + result.decoder.weights.count}",
        "passed" if result.passed else f"failed: {'; '.join(result.failures)}",
    ]
    return "\n".join(lines)


def answer(result: Verification) -> str:
    """Returns how far the decoders' answers agree."""
    decoder = result.decoder
    likeliest = f"next tokens that agree: {decoder.logits.same_argmax:.0%}"
    if decoder.greedy_same is None:
        return f"{likeliest} (no answer was generated: the weights do not fit in memory); KL {decoder.kl:.4f}"
    return (
        f"{likeliest}; along a greedy answer of {decoder.greedy_tokens}: {decoder.greedy_same:.0%}, the first "
        f"{decoder.greedy_prefix} identical; KL {decoder.kl:.4f}"
    )
