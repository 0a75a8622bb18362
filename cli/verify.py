"""`fastvlm verify`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .progress import StageProgress


def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The checkpoint that it was exported from.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a folder's package and decoder, and compare them with the checkpoint. Exit 1 when they fall short."""
    from ..export.verify import verify

    with StageProgress() as progress:
        result = verify(folder, against, on_stage=progress)
    if as_json:
        typer.echo(json.dumps({"passed": result.passed, "failures": result.failures, **result.as_dict()}, indent=2))
    else:
        rows = (
            ("image_features", result.encoder, result.encoder_floor_db),
            ("logits", result.decoder, result.decoder_floor_db),
        )
        typer.echo(f"{'':16}{'SNR':>9}{'floor':>9}{'worst row':>11}{'cosine':>10}")
        for what, agreement, floor in rows:
            typer.echo(
                f"{what:16}{agreement.snr_db:6.1f} dB{floor:6.0f} dB{agreement.worst_row_snr_db:8.1f} dB"
                f"{agreement.cosine:10.6f}"
            )
        typer.echo(f"greedy tokens that agree: {result.decoder.same_argmax:.0%}")
        typer.echo("passed" if result.passed else f"failed: {'; '.join(result.failures)}")
    raise typer.Exit(0 if result.passed else 1)
