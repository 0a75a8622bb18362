"""`fastvlm bench`"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as given
from .bench_estimate import check_used, print_estimates
from .outputs import STDOUT, check_pictures, check_reports, check_tables, write_picture, write_text
from .progress import StageProgress, note

if TYPE_CHECKING:
    from ..runtime.benchmark.cases import Case
    from ..runtime.benchmark.comparison import Comparison
    from ..runtime.benchmark.report import Benchmark


def bench_command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="FOLDER...", help="Exported folders; or MODEL as `export` takes it, exported for this."),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", metavar="F", help="Default: a sample.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Default: Describe the image.")] = None,
    runs: Annotated[int, typer.Option(help="Answers that count, in each process.")] = 5,
    warmup: Annotated[int, typer.Option(help="Answers after the first, cold one that do not count.")] = 2,
    processes: Annotated[int, typer.Option(help="New processes for each row: two are the least to compare.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    image_size: Annotated[
        str | None, typer.Option(metavar="N,...", help="Of a MODEL: export and measure at these sizes.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="Of a MODEL: encoder weights, as `export` takes them.")] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="N,...", help="Lengthen the prompt to these positions, the image included.")
    ] = None,
    vision: given.Vision = None,
    compute_units: given.ComputeUnits = None,
    kv_bits: given.KVBits = None,
    compare: Annotated[Path | None, typer.Option(metavar="OLD.json", help="An earlier --json to compare with.")] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="PCT", help="With --compare: exit 1 if TTFT is slower by more, or a row cannot be judged."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write the report here; `-` prints it.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="F.md", help="Write the tables here too.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="F.png", help="Draw the stages as stacked bars (matplotlib).")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show the FastVLM paper's times below, as what they are.")
    ] = False,
    estimate: Annotated[
        str | None,
        typer.Option(metavar="CHIP,...", help="Measure nothing: estimate for these chips; `list` shows them."),
    ] = None,
) -> None:
    """Measure the time to first token by stage, tokens per second, memory and sizes."""
    from ..runtime.benchmark.comparison import compare as compared
    from ..runtime.benchmark.markdown import report
    from ..runtime.benchmark.reading import read_benchmark
    from ..runtime.benchmark.run import benchmark
    from ..runtime.benchmark.workload import PROMPT, SAMPLE, Workload
    from ..runtime.estimate.report import published_lines

    check_reports(json_file)
    check_tables(markdown)
    check_picture(plot)
    lengths, sizes = numbers(prompt_tokens, "--prompt-tokens"), numbers(image_size, "--image-size")
    if estimate is not None:
        check_used(context, estimate)
        print_estimates(estimate, models or [], sizes, lengths, quant, json_file, markdown, plot)
        return
    if not models:
        raise typer.BadParameter("name at least one exported folder to measure", param_hint="FOLDER...")
    check_gate(fail_above, compare, processes)
    workload = Workload(image or SAMPLE, PROMPT if prompt is None else prompt, max_tokens, runs, warmup)
    old = None if compare is None else read_benchmark(compare)
    with StageProgress() as progress, prepared(models, sizes, quant, progress) as cases:
        found = benchmark(
            cases,
            workload,
            prompt_tokens=lengths,
            processes=processes,
            vision=vision,
            compute_units=compute_units,
            kv_bits=kv_bits,
            on_stage=progress,
        )
    comparison = compared(found, old) if old else None
    text = "\n".join((*report(found, comparison), *(("", *published_lines()) if published else ()))) + "\n"
    if json_file != STDOUT:
        typer.echo(text, nl=False)
    for remark in dict.fromkeys(remark for one in found.configurations for remark in one.notes):
        note(remark)
    write(found, comparison, text, json_file, markdown)
    if plot is not None:
        draw(found, plot, published)
    if comparison and fail_above is not None:
        judge(comparison, fail_above)


def check_gate(limit: float | None, compare: Path | None, processes: int) -> None:
    """Raises BadParameter, UsageError where `--fail-above` could never fail."""
    from ..models.errors import UsageError
    from ..runtime.benchmark.comparison import MIN_PROCESSES

    if limit is None:
        return
    if compare is None:
        raise typer.BadParameter("add --compare OLD.json, an earlier --json to compare with", param_hint="--fail-above")
    if not 0 <= limit < math.inf:
        raise typer.BadParameter(f"should be a percentage from 0; found {limit:g}", param_hint="--fail-above")
    if processes < MIN_PROCESSES:
        raise UsageError(f"--fail-above needs --processes {MIN_PROCESSES}, the least that can be judged, or more")


def judge(comparison: Comparison, limit: float) -> None:
    """Raises Exit (of 1) where TTFT is slower by more than `limit` percent, UsageError where a row has no verdict."""
    from ..models.errors import UsageError

    if 100 * comparison.slowdown > limit:
        note(f"TTFT is slower by {comparison.slowdown:.1%}, more than {limit:g} %")
        raise typer.Exit(1)
    if comparison.unjudged:
        raise UsageError(f"--fail-above could not judge every row: {'; '.join(comparison.unjudged)}")


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """`256,512` -> (256, 512)."""
    try:
        found = tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found) or (text is not None and not found):
        raise typer.BadParameter(f"should be whole numbers with commas between, such as 256,512; found {text!r:.60}",
                                 param_hint=option)  # fmt: skip
    return tuple(dict.fromkeys(found))


def check_picture(plot: Path | None) -> None:
    """Raises UsageError, MachineError."""
    from ..runtime.evaluation.plot import require_matplotlib

    check_pictures(plot)
    if plot is not None:
        require_matplotlib("--markdown")


@contextmanager
def prepared(
    models: Sequence[str], sizes: Sequence[int], quant: str | None, on_stage: StageProgress
) -> Iterator[list[Case]]:
    """What is to be measured; a MODEL is exported for as long as the block runs.

    Raises:
        UsageError: a size or scheme is asked of a folder that has another.
        FastVLMError: a MODEL cannot be exported.
    """
    from ..runtime.benchmark.cases import Case

    found = [(model, resolved(model, sizes, quant)) for model in models]  # all of them, before the first is exported
    cases = []
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as scratch:
        for model, case in found:
            if case:
                cases.append(case)
                continue
            from ..export.exporter import export  # folders are measured without it

            for size in sizes or (None,):
                name = Path(model).name if Path(model).exists() else model
                label = " ".join([name, quant or "int8", *([f"{size} px"] if size else [])])
                folder = Path(scratch) / str(len(cases))
                # a shortfall is allowed: it is measured for its speed
                export(model, folder, quant=quant, image_size=size, allow_shortfall=True, on_stage=on_stage)
                cases.append(Case(label, folder))
        yield cases


def resolved(model: str, sizes: Sequence[int], quant: str | None) -> Case | None:
    """An exported folder; None for a MODEL that can be exported. Raises FastVLMError where it is neither."""
    from ..models.config import check_image_size
    from ..models.references import open_checkpoint
    from ..runtime.benchmark.cases import exported_folder, folder_case

    if exported := exported_folder(model):
        return folder_case(exported, sizes, quant)

    open_checkpoint(model)
    for size in sizes:
        check_image_size(size)
    return None


def write(
    found: Benchmark,
    comparison: Comparison | None,
    text: str,
    json_file: Path | None,
    markdown: Path | None,
) -> None:
    """Report and tables, where they are asked for."""
    if json_file is not None:
        whole: dict[str, Any] = found.as_dict()
        if comparison:
            whole["comparison"] = comparison.as_dict()
        write_text(json_file, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    if markdown is not None:
        write_text(markdown, text)


def draw(found: Benchmark, plot: Path, published: bool) -> None:
    from ..runtime.benchmark.plot import figure_of_benchmark
    from ..runtime.estimate.report import published_bars

    figure = figure_of_benchmark(found, published_bars() if published else ())
    write_picture(plot, lambda file: figure.savefig(file, format="png", dpi=144))
