"""`fastvlm inspect`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as given
from .progress import megabytes

if TYPE_CHECKING:
    from ..export.inspect_asset import AssetReport
    from ..export.inspect_package import PackageReport
    from ..models.compute_plan import Placement

LISTED_PLACES = 5
"""The most operations that are listed when Core ML runs them elsewhere: enough to see a pattern."""


def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An exported model folder, a .mlpackage, or a .aimodel.")
    ],
    with_placement: Annotated[
        bool, typer.Option("--placement", help="Also show where Core ML runs each operation (macOS only).")
    ] = False,
    as_json: given.AsJson = False,
) -> None:
    """Describe a package: inputs, operations, bytes, FLOPs. Exits with 1 if it breaks a rule of the Neural Engine."""
    from ..export.inspect_asset import asset_of, inspect_asset, is_only_asset
    from ..export.inspect_package import inspect

    asset = inspect_asset(given_asset) if (given_asset := asset_of(path)) else None
    if asset and is_only_asset(path) and not with_placement:
        typer.echo(json.dumps({"coreai": asset.as_dict()}, indent=2) if as_json else "\n".join(asset_lines(asset)))
        return
    report = inspect(path)
    found = placement_of(report.path) if with_placement else None
    if as_json:
        places = {} if found is None else {"placement": found.as_dict()}
        assets = {} if asset is None else {"coreai": asset.as_dict()}
        typer.echo(json.dumps({**report.as_dict(), **places, **assets}, indent=2))
    else:
        more = (*(placement_lines(found) if found else ()), *(asset_lines(asset) if asset else ()))
        typer.echo("\n".join((*lines(report), *more)))
    raise typer.Exit(1 if report.errors else 0)


def placement_of(package: Path) -> Placement:
    """The package's placement, from the compiled copy that `generate` uses: compiling for the engine takes minutes."""
    from ..models.compute_plan import check_plans, placement
    from ..runtime.engine_share import compiled_copy

    check_plans()
    return placement(compiled_copy(package))


def lines(report: PackageReport) -> Iterator[str]:
    """Yields the lines that describe a package."""
    for what, tensors in (("input", report.inputs), ("output", report.outputs)):
        for tensor in tensors:
            layout = report.image_inputs.get(tensor.name)
            yield f"{what:11}{tensor.name} {f'image {layout} {list(tensor.shape)}' if layout else tensor}"
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.operations.items())
    yield f"{'operations':11}{sum(report.operations.values())}, rank {report.max_rank} at most: {kinds}"
    stored = ", ".join(f"{scheme} {megabytes(count)}" for scheme, count in report.weight_bytes.items())
    yield f"{'weights':11}{megabytes(sum(report.weight_bytes.values()))}: {stored}"
    yield f"{'compute':11}{report.flops / 1e9:,.1f} GFLOP per image"
    yield f"{'largest':11}{', '.join(f'{t} {megabytes(t.nbytes)}' for t in report.largest_operands[:3])}"
    if not report.findings:
        yield f"{'lint':11}no findings"
    for finding in report.findings:
        yield f"{finding.severity:11}{finding.rule}: {finding.count} x, for example {finding.example}"
        yield f"{'':11}{finding.reason}; {finding.advice}"
        if finding.source:
            yield f"{'':11}{finding.source}"


def asset_lines(asset: AssetReport) -> Iterator[str]:
    """Yields the lines that describe a Core AI asset."""
    producer = asset.metadata.get("producer", "an unknown writer")
    size = megabytes(asset.nbytes)
    yield f"{'Core AI':11}experimental: {asset.path.name}, {size}, for {asset.systems}, by {producer}"
    if asset.unread:
        yield f"{'':11}the program was not read: {asset.unread}"
        return
    for what, tensors in (("input", asset.inputs), ("output", asset.outputs)):
        for name, kind in tensors.items():
            yield f"{'':11}{what} {name} {kind}"
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(asset.operations.items(), key=lambda one: -one[1]))
    yield f"{'':11}operations: {kinds}"
    yield f"{'':11}stored numbers: {', '.join(f'{kind} {count:,}' for kind, count in asset.numbers.items())}"


def placement_lines(found: Placement) -> Iterator[str]:
    """Yields the share of each compute unit, and the operations that run elsewhere."""
    shares = ", ".join(f"{device} {share:.1%}" for device, share in found.cost_by_device.items())
    yield f"{'placement':11}{shares} of the estimated cost"
    for place in found.elsewhere[:LISTED_PLACES]:
        yield f"{'':11}{place.name} ({place.kind}) on {place.device}, {place.cost:.1%}"
