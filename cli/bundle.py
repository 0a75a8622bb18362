"""`fastvlm bundle`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .progress import StageProgress, megabytes, note

if TYPE_CHECKING:
    from ..export.bundle.check import BundleCheck
    from ..export.bundle.memory import Estimate
    from ..export.bundle.write import Bundle


def bundle_command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="An exported model folder.", show_default=False)
    ] = None,
    target: Annotated[
        str, typer.Option(help="The client: apple-app, mlx-swift-lm or mlx-vlm.", show_default=False)
    ] = "",
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder to write, or a checkout of the app; with --zip a file."),
    ] = None,
    zipped: Annotated[bool, typer.Option("--zip", help="Write one zip file instead of a folder.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the memory estimate counts on. Default: 2048, or the model's.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Judge a bundle, whoever made it. Exit 1 when it has faults.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the assets that a client wants of a model, checked against what its code demands."""
    if not target:
        raise typer.BadParameter("say for which client: apple-app, mlx-swift-lm or mlx-vlm", param_hint="--target")
    if check is not None:
        if folder is not None or to is not None:
            raise typer.BadParameter("--check takes the bundle's folder, and neither FOLDER nor --to")
        judge(check, target, as_json)
    if folder is None or to is None:
        raise typer.BadParameter("name the model's FOLDER and where the bundle goes: FOLDER --target T --to DIR")
    from ..export.bundle.write import bundle

    with StageProgress() as progress:
        result = bundle(folder, target, to, zipped=zipped, context=context, on_stage=progress)
    for text in result.notes:
        note(text)
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else "\n".join(summary(result)))


def judge(folder: Path, target: str, as_json: bool) -> None:
    from ..export.bundle.check import check_bundle

    result = check_bundle(folder, target)
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else "\n".join(verdict(result)))
    raise typer.Exit(0 if result.passed else 1)


def verdict(result: BundleCheck) -> Iterator[str]:
    if result.passed:
        yield f"{result.folder} is what {result.target} wants"
    for fault in result.faults:
        yield f"fault: {fault}"


def summary(result: Bundle) -> Iterator[str]:
    yield f"{result.path}: {megabytes(result.total_bytes)} for {result.target}, checked"
    sizes: dict[str, int] = {}
    for name, entry in result.files.items():
        top = name.split("/")[0]
        sizes[top] = sizes.get(top, 0) + entry["bytes"]
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        yield f"  {name:32}{megabytes(size):>12}"
    yield from memory_lines(result.estimate)


def memory_lines(estimate: Estimate) -> Iterator[str]:
    yield f"in memory, estimated, with {estimate.context} tokens of context: {megabytes(estimate.total_bytes)}"
    for name, size in estimate.parts.items():
        yield f"  {name:32}{megabytes(size):>12}"
    for phone in estimate.as_dict()["phones"]:
        limits = f"{phone['limit_bytes'] / 1e9:.1f} GB, {phone['entitled_bytes'] / 1e9:.1f} GB with the entitlement"
        fits = "fits" if phone["fits"] else "fits with the entitlement" if phone["fits_entitled"] else "will not fit"
        yield f"  {phone['ram']} phone ({phone['examples']}: {limits}): {fits}"
    for text in estimate.advice:
        yield f"  {text}"
