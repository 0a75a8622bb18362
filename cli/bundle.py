"""`fastvlm bundle`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import options as given
from .progress import StageProgress, megabytes, note

if TYPE_CHECKING:
    from ..export.bundle.check import BundleCheck
    from ..export.bundle.memory import Estimate
    from ..export.bundle.write import Bundle


def bundle_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported model folder. With --check, a bundle.")],
    client: Annotated[
        given.Client, typer.Option("--for", metavar=given.CLIENT_CHOICES, help="Choose the client.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Write this folder, or into a checkout of Apple's app.",
            show_default="./FOLDER-CLIENT",
        ),
    ] = None,
    zipped: Annotated[bool, typer.Option("--zip", help="Write one zip file instead of a folder.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Estimate memory for N tokens of context.", show_default="2048, or the model's limit"
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate FOLDER as a bundle, and write nothing. Exits with 1 if invalid.")
    ] = False,
    as_json: given.AsJson = False,
) -> None:
    """Package a model folder for an app, and validate the result against the app's loader."""
    if check:
        if out is not None or zipped or context is not None:
            raise typer.BadParameter("writes nothing: leave out --out, --zip and --context", param_hint="--check")
        judge(folder, client, as_json)
    from ..export.bundle.write import bundle

    if out is None:
        out = Path(f"{folder.expanduser().absolute().name}-{client}{'.zip' if zipped else ''}")
    with StageProgress() as progress:
        result = bundle(folder, client, out, zipped=zipped, context=context, on_stage=progress)
    for text in result.notes:
        note(text)
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else "\n".join(summary(result)))


def judge(folder: Path, client: str, as_json: bool) -> NoReturn:
    """Prints the faults of a bundle, and exits with 0 if there are none."""
    from ..export.bundle.check import check_bundle

    result = check_bundle(folder, client)
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else "\n".join(verdict(result)))
    raise typer.Exit(0 if result.passed else 1)


def verdict(result: BundleCheck) -> Iterator[str]:
    """Yields the lines of a check."""
    if result.passed:
        yield f"{result.folder} is valid for {result.client}"
    for fault in result.faults:
        yield f"fault: {fault}"


def summary(result: Bundle) -> Iterator[str]:
    """Yields the sizes of a bundle, and its estimated memory."""
    yield f"{result.path}: {megabytes(result.total_bytes)} for {result.client}, checked"
    sizes: dict[str, int] = {}
    for name, entry in result.files.items():
        top = name.split("/")[0]
        sizes[top] = sizes.get(top, 0) + entry["bytes"]
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        yield f"  {name:32}{megabytes(size):>12}"
    yield from memory_lines(result.estimate)


def memory_lines(estimate: Estimate) -> Iterator[str]:
    """Yields the estimated memory by part, and which phones have enough."""
    yield f"estimated memory with {estimate.context} tokens of context: {megabytes(estimate.total_bytes)}"
    for name, size in estimate.parts.items():
        yield f"  {name:32}{megabytes(size):>12}"
    for phone in estimate.as_dict()["phones"]:
        limits = f"{phone['limit_bytes'] / 1e9:.1f} GB, {phone['entitled_bytes'] / 1e9:.1f} GB with the entitlement"
        fits = "fits" if phone["fits"] else "fits with the entitlement" if phone["fits_entitled"] else "does not fit"
        yield f"  {phone['ram']} phone ({phone['examples']}: {limits}): {fits}"
    for text in estimate.advice:
        yield f"  {text}"
