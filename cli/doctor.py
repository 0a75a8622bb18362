"""`fastvlm doctor`"""

from __future__ import annotations

import json

import typer

from . import options as given


def doctor_command(
    as_json: given.AsJson = False,
) -> None:
    """Check hardware, packages and disk space. Exits with 1 if a required package is missing."""
    from ..runtime.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.mark} {finding.subject:<16}{finding.detail}")
            if finding.advice:
                typer.echo(f"  {'':<16}{finding.advice}")
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)
