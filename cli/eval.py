"""`fastvlm eval`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options as given
from .interrupt import Interrupted
from .outputs import check_pictures, check_reports, write_picture, write_text
from .progress import QuestionProgress, note, one_line

if TYPE_CHECKING:
    from ..runtime.evaluation.run import Comparison, Evaluation


def eval_command(
    folder: given.Folder,
    data: Annotated[
        str,
        typer.Option(metavar="tiny|FILE|DIR", help="Ask about drawn scenes (tiny), or the questions of a data set."),
    ] = "tiny",
    task: Annotated[
        Literal["textvqa", "chartqa", "docvqa", "questions"] | None,
        typer.Option(help="Set the data set's layout.", show_default="detected"),
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Find the data set's images here.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Ask N questions. 0 asks all of a data set.")] = 2000,
    system: given.System = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop each answer after N tokens.", show_default="what the data set needs"),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Compare with an earlier --report, question by question.")
    ] = None,
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    kv_bits: given.KVBits = None,
    verify_hashes: given.VerifyHashes = False,
    as_json: given.AsJson = False,
    report: given.Report = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Plot accuracies and mix-ups (needs matplotlib).", rich_help_panel=given.OUTPUT
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw images with their answers.", rich_help_panel=given.OUTPUT),
    ] = None,
) -> None:
    """Ask held-out questions, and count the right answers by kind of question. Answers are greedy and reproducible."""
    from ..runtime.evaluation.datasets import open_data
    from ..runtime.evaluation.run import EvaluationRun, read_evaluation
    from ..runtime.evaluation.run import compare as compared
    from ..runtime.request import prepare

    check_data(data, task, images)
    check(report, plot, samples)
    old = None if compare is None else read_evaluation(compare)
    prepare(
        None, "", system=system, max_tokens=1 if max_tokens is None else max_tokens
    )  # wrong options are reported before the model is loaded
    questions = open_data(data, limit, task, images)
    model = given.loaded(folder, backend, compute_units, kv_bits, verify_hashes)
    run = EvaluationRun(model, questions, system, max_tokens)
    interrupted = ask(run, questions.count)
    evaluation = run.evaluation
    comparison = compared(evaluation, old) if old and evaluation.answers else None
    if as_json:
        typer.echo(as_text(evaluation, comparison), nl=False)
    else:
        typer.echo("\n".join(table(evaluation)))
        if comparison:
            typer.echo("\n".join(["", *comparison_table(comparison)]))
    for text in remarks(evaluation):
        note(text)
    write(evaluation, comparison, report, plot, samples)
    if interrupted:
        raise interrupted


def ask(run: Any, count: int) -> Interrupted | None:
    """Runs to the end or to a Ctrl-C. That is returned, so that the answers so far can be reported first."""
    try:
        with QuestionProgress(count) as progress:
            for answer in run:
                progress(answer.score)
    except Interrupted as reason:
        return reason
    return None


def check_data(data: str, task: str | None, images: Path | None) -> None:
    """Raises BadParameter when options of a data set are given without one."""
    given_ones = [name for name, value in (("--task", task), ("--images", images)) if value is not None]
    if data == "tiny" and given_ones:
        raise typer.BadParameter("needs a data set: add --data FILE", param_hint=" and ".join(given_ones))


def check(report: Path | None, plot: Path | None, samples: Path | None) -> None:
    """Raises UsageError or MachineError for what would otherwise fail after minutes of work."""
    from ..runtime.evaluation.plot import require_matplotlib

    check_reports(report)
    check_pictures(plot, samples)
    if plot is not None:
        require_matplotlib()


def table(evaluation: Evaluation) -> Iterator[str]:
    """Yields the lines of the accuracies by kind of question."""
    data, asked = evaluation.data, len(evaluation.answers)
    partial = "" if evaluation.complete else f" (partial: {asked:,} of {data.count:,})"
    untrained = "" if evaluation.folder["trained"] else "; the weights are random"
    folder = one_line(evaluation.folder["path"])
    yield f"{data.name}, {asked:,} questions{partial}, {data.metric}; asked of {folder}{untrained}"
    yield f"{'kind':<16}{'n':>7}{'accuracy':>12}{'95% interval':>18}"
    for kind, row in evaluation.rows.items():
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        yield f"{one_line(kind)[:16]:<16}{row.n:>7,}{row.accuracy:>12.1%}{interval:>18}"
    yield f"{evaluation.seconds:.0f} s{ttft_text(evaluation)}"


def ttft_text(evaluation: Evaluation) -> str:
    from statistics import median

    times = evaluation.ttft_ms
    return f"; TTFT {median(times):.1f} ms, the median of {len(times):,} new images" if times else ""


def comparison_table(comparison: Comparison) -> Iterator[str]:
    """Yields the lines of what changed since an earlier evaluation."""
    yield f"compared with {one_line(comparison.old_folder)}, question by question"
    if not comparison.changes:
        yield "no question is in both evaluations: the earlier one asked others, or about other images"
        return
    yield f"{'kind':<16}{'n':>7}{'before':>10}{'now':>10}{'points':>9}{'better':>8}{'worse':>7}{'p':>8}"
    for kind, change in comparison.changes.items():
        verdict = "beyond noise" if change.beyond_noise else "within noise"
        yield (
            f"{one_line(kind)[:16]:<16}{change.n:>7,}{change.old:>10.1%}{change.new:>10.1%}{change.points:>+9.1f}"
            f"{change.better:>8}{change.worse:>7}{change.p:>8.3f}  {verdict}"
        )
    if comparison.left_out:
        yield f"{comparison.left_out:,} questions are not in the earlier evaluation, or about other images"


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """Yields the notes for stderr."""
    failures = evaluation.failures
    if failures:
        yield f"{len(failures):,} questions could not be answered and count as wrong: {failures[0].error}"
    if evaluation.data.note:
        yield evaluation.data.note
    yield from evaluation.notes


def as_text(evaluation: Evaluation, comparison: Comparison | None) -> str:
    """Returns the report as JSON."""
    found = evaluation.as_dict()
    if comparison:
        found["comparison"] = comparison.as_dict()
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def write(
    evaluation: Evaluation,
    comparison: Comparison | None,
    report: Path | None,
    plot: Path | None,
    samples: Path | None,
) -> None:
    """Writes the report and the images that were asked for."""
    if report is not None:
        write_text(report, as_text(evaluation, comparison))
    if plot is not None and evaluation.answers:
        from ..runtime.evaluation.plot import accuracy_figure

        figure = accuracy_figure(evaluation)
        write_picture(plot, lambda file: figure.savefig(file, format="png", dpi=144))
    if samples is not None and evaluation.answers:
        from ..runtime.evaluation.plot import sample_sheet

        sheet = sample_sheet(evaluation)
        write_picture(samples, lambda file: sheet.save(file, format="PNG"))
