"""`fastvlm caption`: captions in bulk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from ..models.errors import UsageError
from . import options as given
from .interrupt import Interrupted
from .progress import LoadProgress, RateProgress, note, one_line

if TYPE_CHECKING:
    from ..runtime.bulk.job import Job, RowMaker

RAY = "Ray"
"""The panel of `--help` with the options of a cluster."""


def caption_command(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES...",
            help="Caption these folders, images, quoted patterns, archives, parquet files or folders of `datasets`.",
        ),
    ] = None,
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="FOLDER", help="An exported model folder, or its hub id.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="Write captions to OUT. If it exists, the run is resumed."),
    ] = ...,  # type: ignore[assignment]
    output_format: Annotated[
        Literal["jsonl", "csv", "parquet", "txt", "xmp", "webdataset"] | None,
        typer.Option("--format", help="Choose the format of OUT.", show_default="by its suffix"),
    ] = None,
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Ask this about each image. Repeat for several. `-` reads stdin."
        ),
    ] = [given.DESCRIBE],  # noqa: B006
    listed: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Caption the paths in FILE, one a line. `-` reads stdin."),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="K/N", help="Caption the Kth of N parts, for N machines. Keys alone decide.")
    ] = "1/1",
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take images from this column of a table.", show_default="found by type"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Decode images in N threads.", show_default="one per core, at most 4"),
    ] = None,
    system: given.System = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Decode N answers at a time.")] = 8,
    max_tokens: given.MaxTokens = 256,
    temperature: given.Temperature = 0.0,
    top_p: given.TopP = 1.0,
    top_k: given.TopK = 0,
    min_p: given.MinP = 0.0,
    repetition_penalty: given.RepetitionPenalty = 1.0,
    seed: given.Seed = None,
    stop: given.Stop = None,
    ignore_eos: given.IgnoreEos = False,
    num_beams: given.NumBeams = 1,
    length_penalty: given.LengthPenalty = 1.0,
    early_stopping: given.EarlyStopping = "false",
    json_schema: given.JsonSchema = None,
    choice: given.Choice = None,
    regex: given.Regex = None,
    grammar: given.Grammar = None,
    fit: given.Fit = None,
    background: given.Background = "white",
    backend: given.Backend = None,
    compute_units: given.ComputeUnits = None,
    encoder_process: given.EncoderProcess = False,
    kv_bits: given.KVBits = None,
    verify_hashes: given.VerifyHashes = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Caption in this process, or by actors of a Ray cluster.", rich_help_panel=RAY),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Connect to this Ray cluster. `auto` finds the one of this machine, `local` starts one.",
            show_default="local",
            rich_help_panel=RAY,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Load the model in N actors.", show_default="1", rich_help_panel=RAY),
    ] = None,
    actor_cpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Reserve N cores for each actor.", show_default="1", rich_help_panel=RAY),
    ] = None,
) -> None:
    """Caption images in bulk, resumably. Exits with 1 if an image has no caption."""
    from ..runtime.bulk.job import Job
    from ..runtime.bulk.log import run_digest
    from ..runtime.bulk.outputs import output_for
    from ..runtime.bulk.sources import Source
    from ..runtime.request import prepare
    from .outputs import check_places

    cluster = {"address": address, "actors": actors, "actor_cpus": actor_cpus}
    cluster = {name: value for name, value in cluster.items() if value is not None}
    if engine == "local" and cluster:
        raise UsageError(f"{next(iter(cluster))} needs engine='ray'.", *cluster, "engine")
    options: dict[str, Any] = {
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
        "fit": fit,
        "background": background,
        **given.beams(num_beams, length_penalty, early_stopping),
        **given.structure(json_schema, choice, regex, grammar),
    }
    if "-" in prompt and str(listed) == "-":
        raise UsageError("--prompt and --from cannot both read stdin. Write one of them to a file.")
    questions = [given.text_from(sys.stdin) if text == "-" else text for text in prompt]
    for question in questions:
        prepare(None, question, **options)  # wrong options are reported before anything is written
    source = Source(images or (), listed, parts_of(shard), column)
    check_places(out)
    with Job(source, output_for(out, output_format), run_digest(model, questions, options)) as job:
        if not job.is_complete:
            load = {
                "backend": backend,
                "compute_units": compute_units,
                "kv_bits": kv_bits,
                "verify_hashes": verify_hashes,
                "encoder_process": encoder_process,
            }
            width = {"batch_size": batch_size, "workers": workers}
            place = cluster if engine == "ray" else None
            with opened(model, questions, options, load, width, place) as (captioner, notes):
                write(job, captioner, source.count())
                for text in notes():
                    note(text)
        job.end()
        known = f", {job.known:,} of them from an earlier run" if job.known else ""
        sys.stderr.write(f"{job.seen:,} images in {out}{known}\n")
        if job.failures:
            note(
                f"{job.failures:,} of {job.seen:,} images have no caption. Their lines in {job.log.path} say why. "
                "Remove those lines to try them again"
            )
            raise typer.Exit(1)


Opened: TypeAlias = "tuple[RowMaker, Callable[[], Sequence[str]]]"
"""A captioner, and the function that returns the notes on its model."""


@contextmanager
def opened(
    model: Path,
    questions: list[str],
    options: dict[str, Any],
    load: dict[str, Any],
    width: dict[str, Any],
    cluster: dict[str, Any] | None,
) -> Iterator[Opened]:
    """Yields the captioner of this process, or that of a Ray cluster, with the model loaded."""
    if cluster is None:
        from ..runtime.bulk.pipeline import Captioner

        vlm = given.loaded(model, **load)
        yield Captioner(vlm, questions, options, **width), lambda: vlm.notes
        return
    from ..runtime.bulk.ray_pool import RayCaptioner

    load = {**load, "kv_bits": given.as_int(load["kv_bits"])}
    with LoadProgress() as progress:
        captioner = RayCaptioner(model, questions, options, load=load, on_wait=progress, **width, **cluster)
    with captioner:
        yield captioner, lambda: captioner.notes


def parts_of(shard: str) -> tuple[int, int]:
    """Returns K and N of `K/N`. Raises UsageError for another form."""
    part, _, parts = shard.partition("/")
    if not (part.isascii() and part.isdigit() and parts.isascii() and parts.isdigit()):
        raise UsageError(f"--shard must have the form K/N, such as 2/5 (got {shard!r:.40}).")
    return int(part), int(parts)


def write(job: Job, captioner: RowMaker, count: int | None) -> None:
    """Writes the missing captions. After a Ctrl-C it says how to resume."""
    written = 0
    waiting = None if count is None else max(1, count - job.written)
    try:
        with RateProgress(waiting, "images") as progress:
            for captioned in job.captions(captioner):
                written += 1
                if captioned.error:
                    progress.say(f"  {one_line(captioned.key)}: {one_line(captioned.error)}")
                progress.advance(f"{job.failures:,} failed" if job.failures else "")
    except Interrupted:
        note(f"{written:,} images done in this run. The same command resumes from there")
        raise
