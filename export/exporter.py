"""`fastvlm export`: a checkpoint becomes a model folder, verified before it appears."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from .._version import __version__
from ..models.checkpoint import Checkpoint, tensors_under
from ..models.errors import PackageError, UsageError, VerificationError
from ..models.files import check_space, write_json
from ..models.float32 import disable_tf32
from ..models.folder_layout import CONFIG_NAME, MANIFEST_FORMAT, MANIFEST_NAME, PACKAGE_NAME
from ..models.random_checkpoint import NOTE as RANDOM_NOTE
from ..models.references import DEFAULT_MODEL, open_checkpoint
from ..models.safetensors_files import write_weights
from ..models.tensor_names import APPLE_ENCODER_PREFIX, language_shapes
from ..quant.decoder import check_language_tensors, saved_tensors
from ..quant.decoder_scheme import DecoderScheme, decoder_scheme
from ..quant.decoder_sensitivity import mixed_bits
from ..quant.encoder_scheme import EncoderScheme, encoder_scheme
from ..quant.prompts import calibration_prompts
from ..quant.recipe import read_recipe
from ..quant.schemes import BLOCKWISE
from .interface import interface_for
from .mlx_encoder import beside_encoder, encoder_bytes, mlx_scheme, read_encoder
from .model_folder import (
    PROCESSOR_CONFIG,
    copy_licences,
    exported_config,
    file_table,
    preprocessor_config,
)
from .output import check_destination, new_folder
from .package_report import inspect
from .recipe import Border, Recipe, calibration_set, check_beside, replayed
from .tokenizer import ExportedTokenizer, export_tokenizer
from .verify import Verification, verify_features
from .write_encoder import WrittenEncoder, write_encoder

ENCODER_BYTES_PER_WEIGHT = 4.0
"""On disk while a package is written, at most: coremltools keeps a copy beside what it saves."""

OTHER_BYTES = 32 * 2**20
"""Tokenizer, configs and some room."""

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    checkpoint: str
    trained: bool
    notes: tuple[str, ...]
    verification: Verification
    encoder_bytes: int
    files: dict[str, dict[str, Any]]
    """Size (`bytes`) and `sha256` of each file, by its path in the folder."""

    @property
    def total_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "checkpoint": self.checkpoint,
            "trained": self.trained,
            "notes": list(self.notes),
            "total_bytes": self.total_bytes,
            "file_bytes": {name: entry["bytes"] for name, entry in self.files.items()},
            "parity": self.verification.as_dict(),
        }


def export(
    model: str | Path = DEFAULT_MODEL,
    out: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    layout: str = "apple",
    quant: str | None = None,
    min_snr: float | None = None,
    max_bytes: str | int | None = None,
    recipe_file: str | Path | None = None,
    decoder_bits: int | str | None = None,
    decoder_quantizer: str | None = None,
    decoder_avg_bits: float | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool | None = None,
    image_size: int | None = None,
    io: str | None = None,
    target: str | None = None,
    with_projector: bool | None = None,
    calibrate: str | Path | None = None,
    force: bool = False,
    allow_lint: bool = False,
    allow_shortfall: bool = False,
    on_stage: OnStage = lambda _: None,
) -> Export:
    """Writes the model folder of a checkpoint: Core ML encoder, MLX decoder, tokenizer, configs, manifest.

    `model` is a checkpoint folder in Apple's, Hugging Face's or mlx-vlm's layout, a hub id that was downloaded, `tiny`
    or `random:SIZE`; `out` defaults to a folder named after it. `adapter` is the folder of a LoRA adapter to merge.
    The folder appears under its name only once it is complete and verified; `on_stage` hears what is being done.
    `layout` is `apple`, a Core ML package, or `mlx`: the encoder stands beside the decoder, for clients that run it in
    MLX; `quant` is then bf16 or fp32, and what is about the package does not apply.
    `quant` is int8 by default; `mixed` keeps `min_snr` (dB, 40 by default) or `max_bytes`. `recipe_file`, an exported
    folder or its `fastvlm.json`, does again what that export did: it settles the encoder's and the decoder's weights,
    and options that do are refused beside it.
    The decoder has `decoder_bits` 8, `group_size` 64 and `quantize_embeddings` by default.
    `io` (`float32`, `float16`, `image`), `target` (`ios17`, `ios18`) and `with_projector` are the package's border: see
    `Interface`. `calibrate` is a folder of images to measure on, instead of embedded ones.
    A package that breaks a rule of the Neural Engine is refused unless `allow_lint`; a result that falls short of the
    checkpoint is refused unless `allow_shortfall`: the manifest's notes tell of both. What is not finite never passes.

    Raises:
        FastVLMError: the checkpoint cannot be read, the output cannot be written, or the result falls short of the
            checkpoint (`VerificationError`). Nothing is left behind.
    """
    disable_tf32()
    checkpoint = open_checkpoint(model, adapter)
    border = Border(io, target, with_projector)
    scheme = scheme_for(layout, quant, min_snr, max_bytes, {**asdict(border), "recipe": recipe_file})
    recipe = Recipe(
        encoder=scheme,
        decoder=decoder_scheme(decoder_bits, decoder_quantizer, decoder_avg_bits, group_size, quantize_embeddings),
        image_size=checkpoint.config.image_size if image_size is None else image_size,
        interface=interface_for([scheme.quant], **asdict(border)),
    )
    saved = None if recipe_file is None else read_recipe(recipe_file)
    if saved is not None:
        check_beside(
            saved,
            {"quant": quant, "min_snr": min_snr, "max_bytes": max_bytes},
            {
                "decoder_bits": decoder_bits,
                "decoder_quantizer": decoder_quantizer,
                "decoder_avg_bits": decoder_avg_bits,
                "group_size": group_size,
                "quantize_embeddings": quantize_embeddings,
            },
        )
        recipe = replayed(recipe, saved, border, keep_size=image_size is not None)
    check_engine(recipe, allow_lint)
    calibration = calibration_set(calibrate, recipe.image_size, checkpoint.config.image_aspect_ratio, saved)
    destination = Path(out).expanduser() if out is not None else default_destination(checkpoint, recipe)
    check_destination(destination, force=force)
    check_language_tensors(checkpoint)
    tokenizer = export_tokenizer(checkpoint.tokenizer_files())
    check_space(destination, bytes_needed(checkpoint, recipe))
    with new_folder(destination, force=force) as folder:
        if recipe.has_package:
            encoder = write_encoder(folder, checkpoint, recipe, calibration, on_stage)
            broken = lint_notes(folder / PACKAGE_NAME, allow_lint)
        else:
            broken = ()
            encoder = read_encoder(checkpoint, recipe, calibration, on_stage)
        recipe = replace(recipe, encoder=replace(recipe.encoder, weights=encoder.plan))
        recipe = replace(recipe, decoder=write_decoder(folder, checkpoint, recipe, encoder, tokenizer, on_stage))
        write_configs(folder, checkpoint, recipe, tokenizer)
        verification = verify_features(
            folder, checkpoint, encoder.images, encoder.reference, manifest_recipe(recipe, encoder), on_stage=on_stage
        )
        if not (verification.passed or allow_shortfall):
            raise VerificationError(
                f"{checkpoint.name} was not exported: {'; '.join(verification.failures)}; "
                "--allow-shortfall writes it anyway"
            )
        on_stage("write the manifest")
        result = Export(
            folder=destination,
            checkpoint=checkpoint.name,
            trained=is_trained(checkpoint),
            notes=(*checkpoint.notes, *encoder.notes, *broken, *verification.encoder.notes, *verification.failures),
            verification=verification,
            encoder_bytes=encoder_bytes(folder),
            files=file_table(folder),
        )
        write_json(folder / MANIFEST_NAME, manifest(checkpoint, recipe, encoder, result))
    return result


def scheme_for(
    layout: str,
    quant: str | None,
    min_snr: float | None,
    max_bytes: str | int | None,
    of_package: Mapping[str, object],
) -> EncoderScheme:
    """How the encoder is stored. Raises UsageError when options contradict each other or the layout."""
    if layout == "apple":
        return encoder_scheme(quant, min_snr, max_bytes)
    if layout != "mlx":
        raise UsageError(f"--layout should be apple or mlx; found {layout!r:.40}")
    return mlx_scheme(quant, {**of_package, "min_snr": min_snr, "max_bytes": max_bytes})


def write_decoder(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    encoder: WrittenEncoder,
    tokenizer: ExportedTokenizer,
    on_stage: OnStage,
) -> DecoderScheme:
    """Writes decoder and projector; returns the scheme with what was chosen for a mixed one."""
    scheme, prompts = recipe.decoder, []
    if scheme.needs_calibration:
        rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
        prompts = calibration_prompts(tokenizer.files["tokenizer.json"], encoder.calibration_features, rows)
    if scheme.is_unsettled:
        scheme = scheme.with_layers(mixed_bits(checkpoint, scheme, prompts, on_stage))
    on_stage("write the decoder's weights")
    tensors = saved_tensors(checkpoint, scheme, prompts)
    write_weights(folder, tensors if recipe.has_package else beside_encoder(encoder.tensors, tensors))
    return scheme


def write_configs(folder: Path, checkpoint: Checkpoint, recipe: Recipe, tokenizer: ExportedTokenizer) -> None:
    config = exported_config(checkpoint, tokenizer.image_token_index, recipe.image_size, recipe.decoder)
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / "preprocessor_config.json", preprocessor_config(recipe.image_size))
    write_json(folder / "processor_config.json", PROCESSOR_CONFIG)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    copy_licences(checkpoint, folder)


def manifest(checkpoint: Checkpoint, recipe: Recipe, encoder: WrittenEncoder, result: Export) -> dict[str, Any]:
    """The content of `fastvlm.json`. It holds no dates and no paths: the same export gives the same bytes."""
    return {
        "format": MANIFEST_FORMAT,
        "fastvlm": __version__,
        "source": {
            "name": checkpoint.name,
            "kind": "folder" if result.trained else "random",
            "sha256": checkpoint.digest(),
        },
        "trained": result.trained,
        "notes": list(result.notes),
        "recipe": manifest_recipe(recipe, encoder),
        "tools": {name: version(name) for name in ("coremltools", "mlx", "torch")},
        "parity": result.verification.as_dict(),
        "files": result.files,
    }


def manifest_recipe(recipe: Recipe, encoder: WrittenEncoder) -> dict[str, Any]:
    """What the manifest says of what was done to the checkpoint: enough to verify it, and to do it again."""
    return {**recipe.as_dict(), **encoder.as_dict()}


def check_engine(recipe: Recipe, allow_lint: bool) -> None:
    """Raises UsageError for what lint will refuse for sure, before the work is done."""
    if BLOCKWISE in {recipe.quant, *recipe.encoder.weights.values()} and not allow_lint:
        raise UsageError(
            f"{BLOCKWISE} has scales per block, which breaks a rule of the Neural Engine: take pal4, which is smaller, "
            "or add --allow-lint"
        )


def lint_notes(package: Path, allow_lint: bool) -> tuple[str, ...]:
    """The rules of the Neural Engine that the package breaks. Raises PackageError unless `allow_lint`."""
    errors = inspect(package).errors
    broken = tuple(f"{finding.rule}: {finding.example} ({finding.reason})" for finding in errors)
    if broken and not allow_lint:
        listed = "; ".join(broken)
        raise PackageError(f"the package would not run on the Neural Engine: {listed}; --allow-lint writes it anyway")
    return tuple(f"breaks a rule of the Neural Engine, which was allowed: {one}" for one in broken)


def is_trained(checkpoint: Checkpoint) -> bool:
    return RANDOM_NOTE not in checkpoint.notes  # also with an adapter merged into it


def default_destination(checkpoint: Checkpoint, recipe: Recipe) -> Path:
    return Path(re.sub(r"[^\w.-]+", "-", checkpoint.name) + f"-{recipe.quant}")


def bytes_needed(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """About how much disk the export takes up while it is written."""
    encoder = sum(prod(info.shape) for info in tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX).values())
    language = sum(prod(shape) for shape in language_shapes(checkpoint.config).values())
    scheme, decoder = recipe.decoder, checkpoint.config.decoder
    half = 0 if scheme.quantize_embeddings or not scheme.is_quantized else decoder.vocab_size * decoder.hidden_size
    written = encoder * ENCODER_BYTES_PER_WEIGHT + 2 * half + (language - half) * scheme.bits_per_weight / 8
    return int(written) + OTHER_BYTES
