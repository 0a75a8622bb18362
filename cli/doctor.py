"""`fastvlm doctor`"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as given
from .export import temporary_export
from .progress import StageProgress
from .verify import print_table

if TYPE_CHECKING:
    from ..runtime.on_device import DeviceVerification


def doctor_command(
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also export the embedded model, and run it on every compute unit."),
    ] = False,
    as_json: given.AsJson = False,
) -> None:
    """Check hardware, packages and disk space.

    Exits with 1 if a required package is missing, or if the compute units that `generate` uses by default fail --deep.
    """
    from ..runtime.doctor import examine

    findings = examine()
    missing = any(finding.state == "missing" for finding in findings)
    if not as_json:
        for finding in findings:
            typer.echo(f"{finding.mark} {finding.subject:<16}{finding.detail}")
            if finding.advice:
                typer.echo(f"  {'':<16}{finding.advice}")
    device = embedded_on_device() if deep and not missing else None
    if as_json:
        listed = [finding.as_dict() for finding in findings]
        whole = {"findings": listed, "on_device": device and device.as_dict()} if deep else listed
        typer.echo(json.dumps(whole, indent=2))
    elif device:
        typer.echo("")
        print_table(device)
    elif deep:
        typer.echo("\nThe embedded model was not run: install what is missing first.")
    raise typer.Exit(1 if missing or (device and not device.passed) else 0)


def embedded_on_device() -> DeviceVerification:
    """Returns what every compute unit makes of `tiny`, which is exported for this."""
    with StageProgress() as progress, temporary_export("tiny", progress) as folder:
        from ..runtime.on_device import verify_on_device

        return verify_on_device(folder, on_stage=progress)
