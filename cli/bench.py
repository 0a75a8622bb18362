"""`fastvlm bench`: the time to first token, measured here or estimated for a chip."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as given
from .outputs import check_pictures, check_reports, check_tables, write_picture, write_text
from .progress import StageProgress, note

if TYPE_CHECKING:
    from ..runtime.benchmark.comparison import Comparison
    from ..runtime.benchmark.report import Benchmark
    from ..runtime.benchmark.workload import Case, Workload
    from ..runtime.bulk.sources import Source
    from ..runtime.estimate.roofline import Estimate
    from ..runtime.estimate.work import Work

MEASURING = "Measuring"
"""A panel of `--help`."""

LIST = "list"

CAPTIONING = ("models", "captions", "prompt", "max_tokens", "runs", "image_size", "quant", "backend", "compute_units",
              "encoder_process", "kv_bits", "as_json", "report")  # fmt: skip
"""The parameters of `bench` that `--captions` uses."""

USED = ("models", "image_size", "quant", "prompt_tokens", "as_json", "report", "markdown", "plot", "estimate")
"""The parameters of `bench` that change an estimate. `published` does not: its times are printed anyway."""


def bench_command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER...", help="Exported folders, or a MODEL as in `export`, which is exported temporarily."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", metavar="FILE", help="Ask about this image.", show_default="a sample"),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this question.")] = given.DESCRIBE,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Measure at these prompt lengths, including the image's tokens."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Generate N tokens per answer.")] = 32,
    captions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGES",
            help="Measure the images/s of `caption` on these images, and of each stage alone. Repeat for several.",
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(metavar="N", help="Measure N answers per process.", rich_help_panel=MEASURING)
    ] = 5,
    warmup: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Discard N warm-up answers per process, after the cold one.",
            rich_help_panel=MEASURING,
        ),
    ] = 2,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Measure each row in N new processes. A comparison needs 2.",
            rich_help_panel=MEASURING,
        ),
    ] = 3,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OLD.json", help="Compare with an earlier --report.", rich_help_panel=MEASURING),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="PCT",
            help="With --compare, exit with 1 if TTFT is more than PCT % slower, or a row cannot be compared.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    estimate: Annotated[
        str | None,
        typer.Option(
            metavar="CHIP,...",
            help="Estimate TTFT for these chips instead of measuring. `list` shows all chips.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="PX,...", help="Export a MODEL at these image sizes.", rich_help_panel=given.MODEL),
    ] = None,
    quant: Annotated[
        given.EncoderQuant | None,
        typer.Option(
            metavar=given.QUANT_CHOICES,
            help="Export a MODEL with this encoder weight format.",
            show_default="int8",
            rich_help_panel=given.MODEL,
        ),
    ] = None,
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    encoder_process: given.EncoderProcess = False,
    kv_bits: given.KVBits = None,
    as_json: given.AsJson = False,
    report: given.Report = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Write the tables to a file.", rich_help_panel=given.OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Plot the stages as stacked bars (needs matplotlib).",
            rich_help_panel=given.OUTPUT,
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Also print the TTFT published in the FastVLM paper.", rich_help_panel=given.OUTPUT
        ),
    ] = False,
) -> None:
    """Measure the time to first token by stage, tokens per second, memory and sizes."""
    from ..runtime.benchmark.comparison import compare as compared
    from ..runtime.benchmark.markdown import report as tables
    from ..runtime.benchmark.report import read_benchmark
    from ..runtime.benchmark.run import benchmark
    from ..runtime.benchmark.workload import SAMPLE, Workload
    from ..runtime.estimate.report import published_lines

    check_reports(report)
    check_tables(markdown)
    check_picture(plot)
    lengths, sizes = numbers(prompt_tokens, "--prompt-tokens"), numbers(image_size, "--image-size")
    if estimate is not None:
        check_used(context, "estimate", "does not measure", ("estimate",) if is_list(estimate) else USED)
        outputs = Outputs(as_json, report, markdown, plot)
        print_estimates(estimate, models or [], sizes, lengths, quant, outputs)
        return
    if not models:
        raise typer.BadParameter("give at least one exported folder", param_hint="FOLDER...")
    if captions is not None:
        from ..runtime.bulk.sources import Source

        check_used(context, "captions", "measures images per second", CAPTIONING)
        workload = Workload(SAMPLE, prompt, max_tokens, runs)
        loading = {
            "backend": backend,
            "compute_units": compute_units,
            "kv_bits": kv_bits,
            "verify_hashes": False,
            "encoder_process": encoder_process,
        }
        with StageProgress() as progress, prepared(models, sizes, quant, progress) as cases:
            print_rates(cases, loading, Source(captions), workload, as_json, report, progress)
        return
    if encoder_process:
        raise typer.BadParameter("needs --captions IMAGES", param_hint="--encoder-process")
    check_gate(fail_above, compare, processes)
    workload = Workload(image or SAMPLE, prompt, max_tokens, runs, warmup)
    old = None if compare is None else read_benchmark(compare)
    with StageProgress() as progress, prepared(models, sizes, quant, progress) as cases:
        found = benchmark(
            cases,
            workload,
            prompt_tokens=lengths,
            processes=processes,
            backend=backend,
            compute_units=compute_units,
            kv_bits=given.as_int(kv_bits),
            on_stage=progress,
        )
    comparison = compared(found, old) if old else None
    text = "\n".join((*tables(found, comparison), *(("", *published_lines()) if published else ()))) + "\n"
    typer.echo(as_text(found, comparison) if as_json else text, nl=False)
    for remark in dict.fromkeys(remark for one in found.configurations for remark in one.notes):
        note(remark)
    if report is not None:
        write_text(report, as_text(found, comparison))
    if markdown is not None:
        write_text(markdown, text)
    if plot is not None:
        draw(found, plot, published)
    if comparison and fail_above is not None:
        judge(comparison, fail_above)


def check_gate(limit: float | None, compare: Path | None, processes: int) -> None:
    """Raises BadParameter or UsageError when `--fail-above` could never fail."""
    from ..models.errors import UsageError
    from ..runtime.benchmark.comparison import MIN_PROCESSES

    if limit is None:
        return
    if compare is None:
        raise typer.BadParameter("add --compare OLD.json, an earlier --report", param_hint="--fail-above")
    if not 0 <= limit < math.inf:
        raise typer.BadParameter(f"must be a percentage of at least 0 (got {limit:g})", param_hint="--fail-above")
    if processes < MIN_PROCESSES:
        raise UsageError(f"fail_above needs processes={MIN_PROCESSES} or more", "fail_above", "processes")


def judge(comparison: Comparison, limit: float) -> None:
    """Raises Exit with 1 if TTFT is more than `limit` percent slower, and UsageError if a row has no verdict."""
    from ..models.errors import UsageError

    if 100 * comparison.slowdown > limit:
        note(f"TTFT is slower by {comparison.slowdown:.1%}, more than {limit:g} %")
        raise typer.Exit(1)
    if comparison.unjudged:
        raise UsageError(f"fail_above cannot judge every row: {'; '.join(comparison.unjudged)}", "fail_above")


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Returns the numbers of a list such as `256,512`."""
    try:
        found = tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found) or (text is not None and not found):
        raise typer.BadParameter(f"must be whole numbers separated by commas, such as 256,512 (got {text!r:.60})",
                                 param_hint=option)  # fmt: skip
    return tuple(dict.fromkeys(found))


def check_picture(plot: Path | None) -> None:
    """Raises UsageError or MachineError when a plot cannot be written."""
    from ..runtime.evaluation.plot import require_matplotlib

    check_pictures(plot)
    if plot is not None:
        require_matplotlib("--markdown")


@contextmanager
def prepared(
    models: Sequence[str], sizes: Sequence[int], quant: str | None, on_stage: StageProgress
) -> Iterator[list[Case]]:
    """Yields the folders to measure. A MODEL is exported, and its folder removed when the block ends.

    Raises:
        UsageError: a folder was exported with another size or scheme than requested.
        FastVLMError: a MODEL cannot be exported.
    """
    from ..runtime.benchmark.workload import Case

    found = [(model, resolved(model, sizes, quant)) for model in models]  # all are checked before the first is exported
    cases = []
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as scratch:
        for model, case in found:
            if case:
                cases.append(case)
                continue
            from ..export.exporter import export  # measuring folders does without it

            for size in sizes or (None,):
                name = Path(model).name if Path(model).exists() else model
                label = " ".join([name, quant or "int8", *([f"{size} px"] if size else [])])
                folder = Path(scratch) / str(len(cases))
                # only its speed is measured, so a shortfall is allowed
                export(model, folder, quant=quant, image_size=size, allow_shortfall=True, on_stage=on_stage)
                cases.append(Case(label, folder))
        yield cases


def resolved(model: str, sizes: Sequence[int], quant: str | None) -> Case | None:
    """Returns an exported folder, or None for a MODEL to export. Raises FastVLMError if `model` is neither."""
    from ..models.config import check_image_size
    from ..models.references import open_checkpoint
    from ..runtime.benchmark.workload import exported_folder, folder_case

    if exported := exported_folder(model):
        return folder_case(exported, sizes, quant)

    open_checkpoint(model)
    for size in sizes:
        check_image_size(size)
    return None


def as_text(found: Benchmark, comparison: Comparison | None) -> str:
    """Returns the report as JSON."""
    whole: dict[str, Any] = found.as_dict()
    if comparison:
        whole["comparison"] = comparison.as_dict()
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def draw(found: Benchmark, plot: Path, published: bool) -> None:
    """Writes the plot of the stages."""
    from ..runtime.benchmark.plot import figure_of_benchmark
    from ..runtime.estimate.report import published_bars

    figure = figure_of_benchmark(found, published_bars() if published else ())
    write_picture(plot, lambda file: figure.savefig(file, format="png", dpi=144))


@dataclass(frozen=True)
class Outputs:
    """Where an estimate goes: JSON in place of the table on stdout, and files."""

    as_json: bool = False
    report: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def check_used(context: typer.Context, name: str, does: str, used: Sequence[str]) -> None:
    """Raises BadParameter with every option that was given and that the option `name` does not use.

    `does` says what `name` does, as the reason.
    """
    ignored = [
        "FOLDER" if parameter.name == "models" else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and parameter.name not in used and was_given(context, parameter.name)
    ]
    if ignored:
        raise typer.BadParameter(f"{does}: leave out {', '.join(ignored)}", param_hint=f"--{name}")


def was_given(context: typer.Context, name: str) -> bool:
    """Returns whether a parameter is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE" and context.params.get(name) not in (None, [], ())


def print_rates(
    cases: Sequence[Case],
    loading: dict[str, Any],
    source: Source,
    workload: Workload,
    as_json: bool,
    report: Path | None,
    on_stage: StageProgress,
) -> None:
    """Prints the images per second of `caption` for each folder. Raises FastVLMError."""
    from ..runtime.benchmark.captions import CaptionBench, report_of, table

    found = []
    for case in cases:
        on_stage(case.label)
        with closing(given.loaded(case.folder, **loading)) as model:
            bench = CaptionBench(model, source, workload.prompt, workload.max_tokens)
            found.append(bench.measured(case.label, workload.runs, on_stage))
    text = json.dumps(report_of(found), indent=2, ensure_ascii=False) + "\n"
    typer.echo(text if as_json else "\n\n".join("\n".join(table(one)) for one in found) + "\n", nl=False)
    for remark in dict.fromkeys(remark for one in found for remark in one.notes):
        note(remark)
    if report is not None:
        write_text(report, text)


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
        draw_estimates(found, outputs.plot)


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


def draw_estimates(found: Sequence[Estimate], plot: Path) -> None:
    """Writes the plot of the estimates."""
    from ..runtime.benchmark.plot import figure_of
    from ..runtime.estimate.report import CAVEAT, estimate_bars, published_bars

    bars = [*estimate_bars(found), *published_bars()]
    figure = figure_of(bars, "Estimated time to first token", CAVEAT)
    write_picture(plot, lambda file: figure.savefig(file, format="png", dpi=144))
