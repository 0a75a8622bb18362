"""`fastvlm inspect`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .progress import megabytes

if TYPE_CHECKING:
    from ..export.package_report import PackageReport


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder, or a .mlpackage.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What a package holds, and which rules of the Neural Engine it breaks. Exit 1 on a broken rule."""
    from ..export.package_report import inspect

    report = inspect(path)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        typer.echo("\n".join(lines(report)))
    raise typer.Exit(1 if report.errors else 0)


def lines(report: PackageReport) -> Iterator[str]:
    for what, tensors in (("input", report.inputs), ("output", report.outputs)):
        yield from (f"{what:11}{tensor.name} {tensor}" for tensor in tensors)
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.operations.items())
    yield f"{'operations':11}{sum(report.operations.values())}, rank {report.max_rank} at most: {kinds}"
    stored = ", ".join(f"{scheme} {megabytes(count)}" for scheme, count in report.weight_bytes.items())
    yield f"{'weights':11}{megabytes(sum(report.weight_bytes.values()))}: {stored}"
    yield f"{'compute':11}{report.flops / 1e9:,.1f} GFLOP per image"
    yield f"{'largest':11}{', '.join(f'{t} {megabytes(t.nbytes)}' for t in report.largest_operands[:3])}"
    if not report.findings:
        yield f"{'lint':11}no finding"
    for finding in report.findings:
        yield f"{finding.severity:11}{finding.rule}: {finding.count} x, such as {finding.example}"
        yield f"{'':11}{finding.reason}; {finding.advice}"
