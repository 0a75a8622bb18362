"""`fastvlm verify`, and its table of compute units, which `doctor --deep` prints too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..models.blas import disable_tf32
from . import options as given
from .export import exported
from .progress import StageProgress

if TYPE_CHECKING:
    from ..export.judge import Judgement
    from ..export.verify import Verification
    from ..runtime.on_device import DeviceRun, DeviceVerification

ADVICE = "Export the checkpoint again, or pass the one that the folder was exported from"
"""The advice if weights differ."""


def verify_command(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="An exported model folder, or a MODEL for --on-device alone.")
    ],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Compare with this checkpoint.")] = None,
    on_device: Annotated[
        bool,
        typer.Option("--on-device", help="Run the package on every compute unit, and compare with the executor."),
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Merge this LoRA adapter into the checkpoint first.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Take what the checkpoint lacks from this one.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read the checkpoint's .bin files too, as export does.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Compare with the checkpoint on the images in DIR.", show_default="embedded images"
        ),
    ] = None,
    judge: Annotated[
        Literal["coreai"] | None,
        typer.Option(help="Also run the encoder in Apple's Core AI interpreter, and compare it with the executor."),
    ] = None,
    judge_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Judge an image of this size, in minutes at 1024.", show_default="256"),
    ] = None,
    as_json: given.AsJson = False,
) -> None:
    """Compare a folder with its checkpoint, or what this machine computes with what it should.

    Exits with 1 if the export falls short of the checkpoint, if the compute units that `generate` uses by default
    disagree with the executor or crash, or if Core AI and the executor disagree.
    """
    disable_tf32()
    if against is None and not on_device and judge is None:
        raise typer.BadParameter("add --against MODEL, --on-device, or both", param_hint="FOLDER")
    if judge is None and judge_size is not None:
        raise typer.BadParameter("add --judge coreai, which it belongs to", param_hint="--judge-size")
    belonging = {"--adapter": adapter, "--base": base, "--allow-pickle": allow_pickle or None, "--images": images,
                 "--judge": judge}  # fmt: skip
    if against is None and (alone := [option for option, value in belonging.items() if value is not None]):
        raise typer.BadParameter("add --against MODEL, which it belongs to", param_hint=alone[0])
    compared, device, judged = None, None, None
    with StageProgress() as progress:
        if against is not None:
            from ..export.verify import verify

            compared = verify(
                folder,
                against,
                adapter=adapter,
                base=base,
                allow_pickle=allow_pickle,
                images=images,
                on_stage=progress,
            )
        if judge is not None and against is not None:
            from ..export.judge import judge as run_judge

            judged = run_judge(
                folder,
                against,
                adapter=adapter,
                base=base,
                allow_pickle=allow_pickle,
                judge_size=judge_size,
                on_stage=progress,
            )
        if on_device:
            from ..runtime.on_device import verify_on_device

            with exported(folder, progress) as path:
                device = verify_on_device(path, on_stage=progress)
    failures = [line for found in (compared, judged, device) if found for line in found.failures]
    if as_json:
        parts = {
            **(compared.as_dict() if compared else {}),
            **({"unchecked": list(compared.unchecked)} if compared and compared.unchecked else {}),
            **({"judge": judged.as_dict()} if judged else {}),
            **({"on_device": device.as_dict()} if device else {}),
        }
        typer.echo(json.dumps({"passed": not failures, "failures": failures, **parts}, indent=2))
    else:
        if compared:
            typer.echo(summary(compared))
        if judged:
            typer.echo(judgement_table(judged))
        if device:
            print_table(device)
    raise typer.Exit(1 if failures else 0)


def summary(result: Verification) -> str:
    """Returns the table of a verification."""
    rows = [
        ("image_features", result.encoder.output, result.encoder_floor_db),
        ("logits", result.decoder.logits, result.decoder_floor_db),
    ]
    if result.asset and result.asset is not result.encoder:
        rows.insert(1, ("the same, Core AI", result.asset.output, result.encoder_floor_db))
    lines = [f"{'':18}{'SNR':>9}{'floor':>9}{'worst row':>11}{'cosine':>10}"]
    lines += [
        f"{what:18}{agreement.snr_db:6.1f} dB{floor:6.0f} dB{agreement.worst_row_snr_db:8.1f} dB"
        f"{agreement.cosine:10.6f}"
        for what, agreement, floor in rows
    ]
    lines += by_kind(result)
    if result.encoder.modes:
        modes = ", ".join(
            f"{precision} {'overflows' if snr_db is None else f'{snr_db:.1f}'}"
            for precision, snr_db in result.encoder.modes.items()
        )
        lines.append(f"the first image, dB: {modes}")
    if result.encoder.stages:
        stages = ", ".join(f"{stage} {snr_db:.0f}" for stage, snr_db in result.encoder.stages.items())
        lines.append(f"stages, dB: {stages}")
    if result.asset:
        lines.append(f"images that Core AI ran: {result.asset.images}")
    lines += [
        *(f"not checked: {text}" for text in result.unchecked),
        answer(result),
        f"weights compared: {result.encoder.weights.count + result.decoder.weights.count}",
        verdict(result),
    ]
    return "\n".join(lines)


def verdict(result: Verification) -> str:
    """Returns `passed`, or the failures, with what to do if weights differ."""
    if result.passed:
        return "passed"
    differ = result.encoder.weights.failures or result.decoder.weights.failures
    return f"failed: {'; '.join(result.failures)}{f'. {ADVICE}' if differ else ''}"


def by_kind(result: Verification) -> list[str]:
    """Returns the agreement by the kind of images, and the share of float16's range that each stage uses."""
    kinds = ", ".join(f"{kind} {agreement.snr_db:.1f}" for kind, agreement in result.encoder.kinds.items())
    lines = [f"image_features, dB: {kinds}"]
    for kind, shares in result.encoder.load.items():
        used = ", ".join(f"{stage} {share:.2%}" for stage, share in shares.items())
        lines.append(f"largest of float16's range, {kind}: {used}")
    return lines


def judgement_table(found: Judgement) -> str:
    """Returns the SNRs of both judges by stage, and the verdict."""
    columns = [
        found.executor["float32"],
        found.judge["float32"],
        *(found.executor[precision] for precision in ("float16", "float16-accumulate")),
        found.judge["float16"],
    ]
    titles = ("executor fp32", "Core AI fp32", "executor fp16", "fp16 sums", "Core AI fp16")
    lines = ["SNR in dB, compared with torch in float32", f"{'':10}" + "".join(f"{title:>15}" for title in titles)]
    lines += [f"{stage:10}" + "".join(f"{rows[stage]:15.1f}" for rows in columns) for stage in columns[0]]
    times = ", ".join(f"{precision} {seconds:.1f} s" for precision, seconds in found.seconds.items())
    verdict = f"failed: {'; '.join(found.failures)}" if found.failures else "passed: both compute the same network"
    return "\n".join([*lines, f"Core AI's runs: {times}", found.scope, verdict])


def answer(result: Verification) -> str:
    """Returns how far the decoders' answers agree."""
    decoder = result.decoder
    likeliest = f"next tokens that agree: {decoder.logits.same_argmax:.0%}"
    if decoder.greedy_same is None:
        return f"{likeliest} (no answer was generated: the weights do not fit in memory); KL {decoder.kl:.4f}"
    return (
        f"{likeliest}; along a greedy answer of {decoder.greedy_tokens}: {decoder.greedy_same:.0%}, the first "
        f"{decoder.greedy_prefix} identical; KL {decoder.kl:.4f}"
    )


NARROW = 100
"""Columns that the table takes where stdout is not a terminal."""


def print_table(found: DeviceVerification) -> None:
    """Prints the table, what is wrong, what is missing, and what to know."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else NARROW)
    table = Table(title=f"{found.image}, compared with the executor in float16", title_justify="left", box=None)
    table.add_column("runs on")
    table.add_column("verdict")
    for name in ("SNR", "cosine", "load", "first", "warm", "engine"):
        table.add_column(name, justify="right")
    for run in found.runs:
        style = "red" if run.fault else None
        table.add_row(*device_row(run), style=style)
    console.print(table)
    for run in found.runs:
        if run.error:
            write(f"{run.way.label}: {run.error}")
    for text in found.missing:
        write(f"not checked: {text}")
    for text in found.notes:
        write(f"note: {text}")
    if found.passed:
        write(f"passed: {found.default.way.label}, which `generate` uses here, computes what it should")
    else:
        write(f"failed: {'; '.join(found.failures)}")


def device_row(run: DeviceRun) -> tuple[str, ...]:
    return (
        f"{run.way.label}{' (default)' if run.default else ''}",
        run.verdict,
        "-" if run.snr_db is None else f"{run.snr_db:.1f} dB",
        "-" if run.cosine is None else f"{run.cosine:.6f}",
        milliseconds(run.load_ms),
        milliseconds(run.first_ms),
        milliseconds(run.warm_ms),
        "-" if run.engine_share is None else f"{run.engine_share:.1%}",
    )


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def write(text: str) -> None:
    sys.stdout.write(f"{' '.join(text.split())}\n")
