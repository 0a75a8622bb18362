"""`fastvlm export`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.float32 import disable_tf32
from ..models.references import DEFAULT_MODEL
from .progress import StageProgress, megabytes, note

if TYPE_CHECKING:
    from ..export.exporter import Export


def export_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint folder, a hub id, tiny, random:tiny, :0.5b, :1.5b, :7b."),
    ] = DEFAULT_MODEL,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A LoRA adapter (PEFT's or LLaVA's folder) to merge first.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Where the encoder goes: apple, a Core ML package; mlx, beside the decoder, for MLX clients."
        ),
    ] = "apple",
    quant: Annotated[
        str | None,
        typer.Option(
            help="Encoder weights: fp16, int8, pal8, pal6, pal4, int4, mixed or w8a8. Default: int8. "
            "With --layout mlx: bf16 (default) or fp32."
        ),
    ] = None,
    min_snr: Annotated[
        float | None, typer.Option(metavar="DB", help="Of mixed: the SNR of image_features to keep. Default: 40.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="N", help="Of mixed, instead: the encoder's size at most, as 80M.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Do again what an earlier export decided: its folder or its fastvlm.json."),
    ] = None,
    decoder_bits: Annotated[
        str | None,
        typer.Option(
            help="Decoder weights: 4, 5, 6, 8 or 16 bits, or mixed: chosen per matrix by measurement. Default: 8."
        ),
    ] = None,
    decoder_avg_bits: Annotated[
        float | None,
        typer.Option(help="Of mixed: bits per weight on average, scales included (4 bits alone are 4.5). Default: 5."),
    ] = None,
    decoder_quantizer: Annotated[
        str | None,
        typer.Option(help="gptq: calibrated, takes minutes; rtn: to the nearest. Default: gptq below 8 bits."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Decoder weights that share a scale: 32, 64 or 128. Default: 64.")
    ] = None,
    quantize_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--quantize-embeddings/--no-quantize-embeddings",
            help="Quantize the embedding table too, as mlx-lm does. Default: yes.",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the encoder's square in pixels, a multiple of 64. Default: as trained.")
    ] = None,
    io: Annotated[
        str | None,
        typer.Option(help="What the package takes and gives: float32, float16, or image (RGB in, float32 out)."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The oldest system that it is for: ios17 (also macOS 14) or ios18 (macOS 15).")
    ] = None,
    with_projector: Annotated[
        bool | None,
        typer.Option(
            "--with-projector/--no-projector", help="Put the projector into the package too; it gives image_embeds."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of images to measure on. Default: embedded drawings.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The folder to write. Default: MODEL-QUANT here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export at OUT.")] = False,
    allow_lint: Annotated[
        bool, typer.Option("--allow-lint", help="Write the package even if a rule of the Neural Engine is broken.")
    ] = False,
    allow_shortfall: Annotated[
        bool, typer.Option("--allow-shortfall", help="Write the folder even if it falls short of the checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model folder: Core ML encoder, MLX decoder, tokenizer; verified before it appears."""
    with StageProgress() as progress:
        progress("load the tools")
        disable_tf32()
        from ..export.exporter import export

        result = export(
            model,
            out,
            adapter=adapter,
            layout=layout,
            quant=quant,
            min_snr=min_snr,
            max_bytes=max_bytes,
            recipe_file=recipe,
            decoder_bits=decoder_bits,
            decoder_avg_bits=decoder_avg_bits,
            decoder_quantizer=decoder_quantizer,
            group_size=group_size,
            quantize_embeddings=quantize_embeddings,
            image_size=image_size,
            io=io,
            target=target,
            with_projector=with_projector,
            calibrate=calibrate,
            force=force,
            allow_lint=allow_lint,
            allow_shortfall=allow_shortfall,
            on_stage=progress,
        )
    for text in result.notes:
        note(text)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        typer.echo(summary(result, progress.seconds))


def summary(result: Export, seconds: float) -> str:
    encoder, decoder = result.verification.encoder.output, result.verification.decoder
    other_bytes = result.total_bytes - result.encoder_bytes
    return "\n".join(
        (
            f"{result.folder}: {megabytes(result.total_bytes)} in {seconds:.0f} s",
            f"next to {result.checkpoint} in float32, on images kept for this:",
            f"  encoder {megabytes(result.encoder_bytes):>12}   image_features {encoder.snr_db:.1f} dB",
            f"  decoder {megabytes(other_bytes):>12}   logits {decoder.logits.snr_db:.1f} dB, "
            f"{decoder.logits.same_argmax:.0%} of greedy tokens agree",
        )
    )
