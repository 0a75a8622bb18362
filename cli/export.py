"""`fastvlm export`, and the temporary export of commands that take a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..models.blas import disable_tf32
from ..models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from ..models.references import DEFAULT_MODEL
from . import options as given
from .progress import StageProgress, megabytes, note

if TYPE_CHECKING:
    from ..export.exporter import Export


ENCODER, DECODER, PACKAGE, SAFETY = "Encoder", "Decoder", "Package", "Safety"
"""Panels of `--help`, with `given.OUTPUT`."""


def export_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint folder, a hub id, tiny, or random:SIZE (tiny, 0.5b, 1.5b, 7b)."
        ),
    ] = DEFAULT_MODEL,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Merge this LoRA adapter first (PEFT, LLaVA or MLX layout).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Take what MODEL lacks from this checkpoint (for a projector alone)."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Repeat the decisions of an earlier export: its folder or fastvlm.json."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Measure on the images in DIR.", show_default="embedded images"),
    ] = None,
    encoder: Annotated[
        Literal["coreml", "mlx"],
        typer.Option(
            help="Write the encoder as a Core ML package, or as MLX weights for MLX clients.", rich_help_panel=ENCODER
        ),
    ] = "coreml",
    format: Annotated[
        Literal["coreml", "coreai", "both"] | None,
        typer.Option(
            help="Write a Core ML package, a Core AI asset (experimental, for macOS and iOS 27), or both.",
            show_default="coreml",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    quant: Annotated[
        given.EncoderQuant | None,
        typer.Option(
            metavar=given.QUANT_CHOICES,
            help="Choose the encoder's weight format. bf16 and fp32 are for --encoder mlx.",
            show_default="int8, or bf16 with --encoder mlx",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    min_snr: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="With --quant mixed, keep this SNR of image_features.",
            show_default="40",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --quant mixed, limit the encoder's size instead (for example 80M).",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Set the side of the square input, a multiple of 64.",
            show_default="as trained",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    decoder_bits: Annotated[
        Literal["4", "5", "6", "8", "16", "mixed"] | None,
        typer.Option(
            help="Set the bits per decoder weight. mixed chooses them per matrix by measurement.",
            show_default="8",
            rich_help_panel=DECODER,
        ),
    ] = None,
    decoder_avg_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="With --decoder-bits mixed, keep this average, scales included.",
            show_default="5",
            rich_help_panel=DECODER,
        ),
    ] = None,
    decoder_quantizer: Annotated[
        Literal["gptq", "rtn"] | None,
        typer.Option(
            help="Calibrate the rounding (gptq, takes minutes) or round to nearest (rtn).",
            show_default="gptq below 8 bits, else rtn",
            rich_help_panel=DECODER,
        ),
    ] = None,
    group_size: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(help="Set how many decoder weights share a scale.", show_default="64", rich_help_panel=DECODER),
    ] = None,
    no_quantize_embeddings: Annotated[
        bool,
        typer.Option("--no-quantize-embeddings", help="Keep the embedding table in float16.", rich_help_panel=DECODER),
    ] = False,
    attention_tiles: Annotated[
        Literal["1", "2", "4"] | None,
        typer.Option(
            help="Compute the queries of large attention maps in parts, with equal results.",
            show_default="1",
            rich_help_panel=PACKAGE,
        ),
    ] = None,
    io: Annotated[
        Literal["float32", "float16", "image"] | None,
        typer.Option(
            help="Choose the package's input and output type. image takes RGB and returns float32.",
            show_default="float32",
            rich_help_panel=PACKAGE,
        ),
    ] = None,
    min_os: Annotated[
        Literal["ios17", "ios18"] | None,
        typer.Option(
            help="Set the oldest system: ios17 (and macOS 14) or ios18 (and macOS 15).",
            show_default="ios17, or ios18 with int4",
            rich_help_panel=PACKAGE,
        ),
    ] = None,
    with_projector: Annotated[
        bool | None,
        typer.Option(
            "--with-projector/--no-projector",
            help="Put the projector into the package, so that it returns image_embeds.",
            show_default="no",
            rich_help_panel=PACKAGE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Write this folder.",
            show_default="./MODEL-QUANT",
            rich_help_panel=given.OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an earlier export.", rich_help_panel=given.OUTPUT)
    ] = False,
    as_json: given.AsJson = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read .bin files too, as tensors only and in their own process. Only for files that you trust.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    allow_lint: Annotated[
        bool,
        typer.Option(
            "--allow-lint",
            help="Write a package that breaks a rule of the Neural Engine.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    allow_shortfall: Annotated[
        bool,
        typer.Option(
            "--allow-shortfall", help="Write a folder that falls short of the checkpoint.", rich_help_panel=SAFETY
        ),
    ] = False,
) -> None:
    """Export a checkpoint to a model folder: Core ML encoder, MLX decoder, tokenizer. The result is verified first."""
    arguments = dict(locals())  # by the names of ExportOptions
    quantize = False if no_quantize_embeddings else None
    with StageProgress() as progress:
        progress("load the tools")
        disable_tf32()
        from ..export.exporter import export_checkpoint
        from ..export.options import ExportOptions

        chosen = {
            "attention_tiles": given.as_int(attention_tiles),
            "group_size": given.as_int(group_size),
            "quantize_embeddings": quantize,
            "on_stage": progress,
        }
        result = export_checkpoint(model, out, ExportOptions.chosen({**arguments, **chosen}))
    for text in result.notes:
        note(text)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        typer.echo(summary(result, progress.seconds))


def summary(result: Export, seconds: float) -> str:
    """Returns the sizes of a finished export, and how close it is to its checkpoint."""
    found, decoder = result.verification, result.verification.decoder
    asset = found.asset if found.asset is not found.encoder else None
    other_bytes = result.total_bytes - result.encoder_bytes - (result.asset_bytes if asset else 0)
    lines = [
        f"{result.folder}: {megabytes(result.total_bytes)} in {seconds:.0f} s",
        f"compared with {result.checkpoint} in float32, on held-out images:",
        f"  encoder {megabytes(result.encoder_bytes):>12}   image_features {found.encoder.output.snr_db:.1f} dB",
        f"  decoder {megabytes(other_bytes):>12}   logits {decoder.logits.snr_db:.1f} dB, "
        f"{decoder.logits.same_argmax:.0%} of greedy tokens agree",
    ]
    if asset:
        lines.append(f"  Core AI {megabytes(result.asset_bytes):>12}   image_features {asset.output.snr_db:.1f} dB")
    return "\n".join(lines)


@contextmanager
def exported(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """Yields the folder itself, or a temporary export of the checkpoint. Raises FastVLMError."""
    folder = Path(model).expanduser()
    if (folder / MANIFEST_NAME).is_file() or (folder / PACKAGE_NAME).is_dir():
        yield folder
        return
    from ..models.references import open_checkpoint

    open_checkpoint(model)  # raises for a wrong name before anything heavy is imported
    with temporary_export(model, on_stage) as exported_folder:
        yield exported_folder


@contextmanager
def temporary_export(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """Yields a temporary int8 export of a checkpoint. Raises FastVLMError."""
    from ..export.exporter import export

    with tempfile.TemporaryDirectory(prefix="fastvlm-") as scratch:
        # A shortfall is allowed, because the command checks how this machine runs the package.
        yield export(model, Path(scratch) / "model", allow_shortfall=True, on_stage=on_stage).folder
