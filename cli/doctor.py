"""`fastvlm doctor`"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """What this machine can do, and what is missing. Exit 1 when something that fastvlm needs is."""
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
