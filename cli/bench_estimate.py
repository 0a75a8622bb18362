"""`fastvlm bench --estimate`"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .outputs import write_picture, write_text

if TYPE_CHECKING:
    from ..runtime.estimate.roofline import Estimate
    from ..runtime.estimate.work import Work

LIST = "list"

USED = ("models", "image_size", "quant", "prompt_tokens", "as_json", "report", "markdown", "plot", "estimate")
"""The parameters of `bench` that change an estimate. `published` does not: its times are printed anyway."""


@dataclass(frozen=True)
class Outputs:
    """Where an estimate goes: JSON in place of the table on stdout, and files."""

    as_json: bool = False
    report: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def check_used(context: typer.Context, chips: str) -> None:
    """Raises BadParameter with every option that was given and does not change an estimate."""
    used = ("estimate",) if is_list(chips) else USED
    ignored = [
        "FOLDER" if parameter.name == "models" else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and parameter.name not in used and was_given(context, parameter.name)
    ]
    if ignored:
        raise typer.BadParameter(f"does not measure: leave out {', '.join(ignored)}", param_hint="--estimate")


def was_given(context: typer.Context, name: str) -> bool:
    """Returns whether a parameter is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE" and context.params.get(name) not in (None, [], ())


def is_list(chips: str) -> bool:
    """Returns whether the chips are to be listed."""
    return chips.strip().lower() == LIST


def print_estimates(
    chips: str,
    models: Sequence[str],
    sizes: Sequence[int],
    lengths: Sequence[int],
    quant: str | None,
    outputs: Outputs,
) -> None:
    """Prints TTFT computed from the model's operations and bytes and the chips' peak rates."""
    from ..runtime.estimate.chips import chip_named
    from ..runtime.estimate.report import as_dict, chip_lines, estimate_lines
    from ..runtime.estimate.roofline import estimate

    if is_list(chips):
        typer.echo("\n".join(chip_lines()))
        return
    wanted = [chip_named(name) for name in chips.split(",") if name.strip()]
    if not models or not wanted:
        raise typer.BadParameter("give a chip (`--estimate list` shows all) and a FOLDER or MODEL")
    found = [estimate(work, chip) for work in works(models, sizes, lengths, quant) for chip in wanted]
    text = "\n".join(estimate_lines(found)) + "\n"
    report = json.dumps(as_dict(found), indent=2) + "\n"
    typer.echo(report if outputs.as_json else text, nl=False)
    if outputs.report is not None:
        write_text(outputs.report, report)
    if outputs.markdown is not None:
        write_text(outputs.markdown, text)
    if outputs.plot is not None:
        draw(found, outputs.plot)


def works(
    models: Sequence[str], sizes: Sequence[int], lengths: Sequence[int], quant: str | None = None
) -> Iterator[Work]:
    """Yields the work of every model at every size and length. A MODEL is not exported for it.

    Raises:
        BadParameter: the size of the scheme is only known after an export.
        FastVLMError: a folder or checkpoint cannot be read, or a folder has another size or scheme.
    """
    from ..models.checkpoint import shapes, tensors_under
    from ..models.config import check_image_size
    from ..models.fastvit_config import FastViTConfig
    from ..models.references import open_checkpoint
    from ..models.tensor_names import APPLE_ENCODER_PREFIX
    from ..runtime.benchmark.workload import exported_folder, folder_case
    from ..runtime.estimate.work import ENCODER_BITS, INT8_ACTIVATIONS, architecture_work, folder_work

    scheme = quant or "int8"
    if scheme not in ENCODER_BITS:
        raise typer.BadParameter(f"an estimate needs {', '.join(ENCODER_BITS)} (got {scheme}). Export the model and "
                                 "estimate the folder", param_hint="--quant")  # fmt: skip
    for model in models:
        if exported := exported_folder(model):
            folder = folder_case(exported, sizes, quant).folder
            yield from (folder_work(folder, length) for length in lengths or (None,))
            continue
        checkpoint = open_checkpoint(model)
        encoder = FastViTConfig.from_shapes(shapes(tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX)))
        for size in sizes or (checkpoint.config.image_size,):
            check_image_size(size)
            for length in lengths or (None,):
                yield architecture_work(
                    f"{checkpoint.name} {scheme}, decoder in 8 bits",
                    checkpoint.config,
                    encoder,
                    image_size=size,
                    prompt_tokens=length,
                    encoder_bits=ENCODER_BITS[scheme],
                    int8_activations=scheme == INT8_ACTIVATIONS,
                )


def draw(found: Sequence[Estimate], plot: Path) -> None:
    """Writes the plot of the estimates."""
    from ..runtime.benchmark.plot import figure_of
    from ..runtime.estimate.report import CAVEAT, estimate_bars, published_bars

    bars = [*estimate_bars(found), *published_bars()]
    figure = figure_of(bars, "Estimated time to first token", CAVEAT)
    write_picture(plot, lambda file: figure.savefig(file, format="png", dpi=144))
