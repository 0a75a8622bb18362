"""`fastvlm.export`: a checkpoint becomes a model folder, which is verified before it appears."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, ParamSpec, Protocol

from .._version import __version__
from ..models.blas import disable_tf32
from ..models.checkpoint import Checkpoint, tensors_under
from ..models.errors import PackageError, UsageError, VerificationError
from ..models.files import check_space, write_json
from ..models.folder_layout import (
    ASSET_NAME,
    ASSET_SYSTEMS,
    CONFIG_NAME,
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    PACKAGE_NAME,
    folder_bytes,
)
from ..models.random_checkpoint import NOTE as RANDOM_NOTE
from ..models.references import DEFAULT_MODEL, open_checkpoint
from ..models.safetensors_files import write_weights
from ..models.tensor_names import APPLE_ENCODER_PREFIX, language_shapes
from ..quant.decoder import check_language_tensors, mixed_bits, saved_tensors
from ..quant.decoder_scheme import DecoderScheme
from ..quant.prompts import calibration_prompts
from ..quant.schemes import BLOCKWISE
from .atomic_folder import check_destination, new_folder
from .coreai import require_coreai
from .engine_reports import engine_notes
from .inspect_package import inspect as inspect_package
from .mlx_encoder import encoder_bytes, read_encoder, with_encoder
from .model_folder import (
    PROCESSOR_CONFIG,
    copy_licences,
    exported_config,
    file_table,
    preprocessor_config,
)
from .options import ExportOptions, OnStage
from .recipe import Recipe, calibration_set, earlier_recipe, planned_recipe
from .tokenizer import ExportedTokenizer, export_tokenizer
from .verify import Verification, verify_features
from .write_encoder import WrittenEncoder, write_encoder

ENCODER_BYTES_PER_WEIGHT = 4.0
"""The most disk space per encoder weight while a package is written. coremltools keeps a copy of what it saves."""

ASSET_BYTES_PER_WEIGHT = 8.0
"""The same for a Core AI asset: the network in float32 for the converter, the asset, and Apple's compiled copy."""

ASSET_NOTE = (
    f"{ASSET_NAME} is experimental: only {ASSET_SYSTEMS} load it, no engine has run it here, and a later beta of "
    "Core AI may refuse or change it"
)

OTHER_BYTES = 32 * 2**20
"""The disk space for tokenizer and configs, with some reserve."""

TOOLS, ASSET_TOOLS = ("coremltools", "mlx", "torch"), ("coreai-core", "coreai-torch")
"""The packages whose versions the manifest has."""

P = ParamSpec("P")


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    checkpoint: str
    """The name of the checkpoint."""
    trained: bool
    """False for random weights, whose text means nothing."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each."""
    verification: Verification
    encoder_bytes: int
    """The bytes of the package, of the encoder in MLX, or of a Core AI asset without a package."""
    asset_bytes: int
    """The bytes of the Core AI asset. 0 without one."""
    files: dict[str, dict[str, Any]]
    """The size (`bytes`) and `sha256` of each file, by its path in the folder."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as it is printed with `--json`."""
        return {
            "folder": str(self.folder),
            "checkpoint": self.checkpoint,
            "trained": self.trained,
            "notes": list(self.notes),
            "total_bytes": self.total_bytes,
            "file_bytes": {name: entry["bytes"] for name, entry in self.files.items()},
            "parity": self.verification.as_dict(),
        }


class ExportFunction(Protocol[P]):
    """The type of `export`: a model, an output folder, and the keyword arguments `P`."""

    def __call__(
        self, model: str | Path = ..., out: str | Path | None = ..., *args: P.args, **options: P.kwargs
    ) -> Export: ...


def with_options(options: Callable[P, ExportOptions]) -> Callable[[Callable[..., Export]], ExportFunction[P]]:
    """Gives a function the keyword arguments of `options` in place of its `**options`, for callers and for `help`."""

    def decorate(function: Callable[..., Export]) -> ExportFunction[P]:
        own = inspect.signature(function)
        kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        keywords = inspect.signature(options).parameters.values()
        function.__signature__ = own.replace(parameters=[*kept, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate


@with_options(ExportOptions)
def export(model: str | Path = DEFAULT_MODEL, out: str | Path | None = None, **options: Any) -> Export:
    """Exports a checkpoint to a model folder: Core ML encoder, MLX decoder, tokenizer, configs, manifest.

    The folder appears under its name only when it is complete and verified.

    Args:
        model: a checkpoint folder in the layout of Apple, Hugging Face or mlx-vlm, the id of a downloaded checkpoint,
            `tiny`, or `random:SIZE`.
        out: the folder to write. By default it is in the current folder and named after the model and `quant`.
        adapter: the folder of a LoRA adapter to merge first, in the layout of PEFT, LLaVA or MLX.
        base: the checkpoint that has what the folder `model` lacks, such as all but the projector after LLaVA's first
            stage.
        allow_pickle: True also reads pickles (`.bin`), as tensors only and in a process of its own. Pickles can run
            arbitrary code, so use it only for files that you trust.
        recipe: an exported folder, its `fastvlm.json`, or a file with only a recipe. Its decisions are repeated, and
            arguments that would decide the same are refused.
        calibrate: a folder of images to measure on, in place of the embedded drawings and photographs.
        encoder: `coreml` for a Core ML package, or `mlx` for weights in the decoder's file, for clients that run the
            encoder in MLX. Arguments about the package are then refused.
        format: `coreml` for a Core ML package (default), `coreai` for a Core AI asset instead, or `both`. An asset is
            experimental, needs the extra `coreai` to write and macOS 27 or iOS 27 to load, and has `quant` `fp16`,
            `int8`, `pal8`, `pal6` or `pal4`.
        quant: the format of the encoder's weights: `int8` (default), `fp16`, `pal8`, `pal6`, `pal4`, `int4`, `w8a8`,
            or `mixed`, which chooses per weight by measurement. With `encoder="mlx"`: `bf16` (default) or `fp32`.
        min_snr: the SNR of `image_features` in dB that `mixed` keeps (default 40).
        max_bytes: the most bytes of the package with `mixed`, such as `80M`, instead of `min_snr`.
        image_size: the side of the square input in pixels, a multiple of 64. By default it is as trained.
        decoder_bits: the bits per decoder weight: 4, 5, 6, 8 (default), 16, or `mixed`, which chooses per matrix by
            measurement.
        decoder_avg_bits: the average bits per weight with `decoder_bits="mixed"`, scales included (default 5).
        decoder_quantizer: `gptq` calibrates the rounding and takes minutes, `rtn` rounds to nearest. The default is
            `gptq` below 8 bits.
        group_size: the number of decoder weights that share a scale: 32, 64 (default) or 128.
        quantize_embeddings: False keeps the embedding table in float16.
        attention_tiles: the number of parts that the queries of large attention maps are computed in: 1 (default), 2
            or 4. The results are equal. More parts are smaller operands and more operations.
        io: the package's input and output type: `float32` (default), `float16`, or `image`, which takes an RGB image
            and returns float32.
        min_os: the oldest system: `ios17` (also macOS 14) or `ios18` (also macOS 15). The default is the oldest one
            that supports the weights.
        with_projector: True puts the projector into the package, which then returns `image_embeds`.
        force: True overwrites an earlier export.
        allow_lint: True accepts a package that breaks a rule of the Neural Engine. The manifest has a note about it.
        allow_shortfall: True accepts a folder that falls short of its checkpoint. The manifest has a note about it.
            NaN and infinite values are never accepted.
        on_stage: a function that is called with a short description of each stage before it begins.

    Returns:
        The folder, the bytes of its files, and the results of the verification.

    Raises:
        UsageError: arguments are invalid or exclude each other.
        VerificationError: the result falls short of the checkpoint.
        FastVLMError: the checkpoint cannot be read, or the output cannot be written. Nothing is left behind.
    """
    return export_checkpoint(model, out, ExportOptions(**options))


def export_checkpoint(model: str | Path, out: str | Path | None, options: ExportOptions) -> Export:
    """Exports a checkpoint: `export` with its keyword arguments as one value."""
    disable_tf32()
    checkpoint = open_checkpoint(model, options.adapter, base=options.base, allow_pickle=options.allow_pickle)
    on_stage = options.on_stage
    saved = earlier_recipe(options)
    recipe = planned_recipe(options, checkpoint.config.image_size, saved)
    if recipe.has_asset:
        require_coreai(f"format={recipe.format!r}", "format")
    check_engine(recipe, options.allow_lint)
    calibration = calibration_set(options.calibrate, recipe.image_size, checkpoint.config.image_aspect_ratio, saved)
    destination = Path(out).expanduser() if out is not None else default_destination(checkpoint, recipe)
    check_destination(destination, force=options.force)
    check_language_tensors(checkpoint)
    tokenizer = export_tokenizer(checkpoint.tokenizer_files())
    check_space(destination, bytes_needed(checkpoint, recipe))
    with new_folder(destination, force=options.force) as folder:
        if recipe.in_mlx:
            encoder = read_encoder(checkpoint, recipe, calibration, on_stage)
        else:
            encoder = write_encoder(folder, checkpoint, recipe, calibration, on_stage)
        package_notes = format_notes(folder, recipe, encoder, options.allow_lint)
        decoder = write_decoder(folder, checkpoint, recipe, encoder, tokenizer, on_stage)
        recipe = recipe.settled(encoder.plan, decoder)
        write_configs(folder, checkpoint, recipe, tokenizer)
        verification = verify_features(
            folder,
            checkpoint,
            encoder.images,
            encoder.reference,
            manifest_recipe(recipe, encoder),
            stored_features=encoder.stored_features,
            on_stage=on_stage,
        )
        check_verification(checkpoint, verification, options.allow_shortfall)
        on_stage("write the manifest")
        result = Export(
            folder=destination,
            checkpoint=checkpoint.name,
            trained=is_trained(checkpoint),
            notes=(
                *checkpoint.notes,
                *tokenizer_notes(checkpoint, tokenizer),
                *encoder.notes,
                *package_notes,
                *verification.encoder.notes,
                *verification.failures,
            ),
            verification=verification,
            encoder_bytes=encoder_bytes(folder),
            asset_bytes=folder_bytes(folder / ASSET_NAME),
            files=file_table(folder),
        )
        write_json(folder / MANIFEST_NAME, manifest(checkpoint, recipe, encoder, result))
    return result


def write_decoder(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    encoder: WrittenEncoder,
    tokenizer: ExportedTokenizer,
    on_stage: OnStage,
) -> DecoderScheme:
    """Writes decoder and projector. Returns the scheme, with the bits that were chosen for a mixed one."""
    scheme, prompts = recipe.decoder, []
    if scheme.needs_calibration:
        rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
        prompts = calibration_prompts(tokenizer.files["tokenizer.json"], encoder.calibration_features, rows)
    if scheme.is_unsettled:
        scheme = scheme.with_layers(mixed_bits(checkpoint, scheme, prompts, on_stage))
    on_stage("write the decoder's weights")
    tensors = saved_tensors(checkpoint, scheme, prompts)
    write_weights(folder, with_encoder(encoder.tensors, tensors) if recipe.in_mlx else tensors)
    return scheme


def write_configs(folder: Path, checkpoint: Checkpoint, recipe: Recipe, tokenizer: ExportedTokenizer) -> None:
    """Writes the JSON files, the tokenizer, and the licences of the checkpoint."""
    config = exported_config(checkpoint, tokenizer.image_token_index, recipe.image_size, recipe.decoder)
    if lacks_turn_end(checkpoint, tokenizer):
        config["eos_token_id"] = [*checkpoint.config.eos_token_ids, tokenizer.turn_end_id]
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / "preprocessor_config.json", preprocessor_config(recipe.image_size))
    write_json(folder / "processor_config.json", PROCESSOR_CONFIG)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    copy_licences(checkpoint, folder)


def tokenizer_notes(checkpoint: Checkpoint, tokenizer: ExportedTokenizer) -> tuple[str, ...]:
    """Returns notes on an end of answers that no config names, and on tokens without an embedding."""
    notes = []
    if lacks_turn_end(checkpoint, tokenizer):
        notes.append(
            f"no config names token {tokenizer.turn_end_id} as an end, but the chat template ends an answer with it: "
            "answers end there too"
        )
    if not tokenizer.begins_answer:
        notes.append(
            "the chat template ignores add_generation_prompt: a prompt ends with the question, not an answer's start"
        )
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    if tokenizer.largest_id >= rows:
        notes.append(
            f"tokenizer.json has ids up to {tokenizer.largest_id}, but embed_tokens has {rows} rows: text with the "
            "tokens past them is refused"
        )
    return tuple(notes)


def lacks_turn_end(checkpoint: Checkpoint, tokenizer: ExportedTokenizer) -> bool:
    """Returns True if no config names the token with which the chat template ends an answer."""
    named = (*checkpoint.config.eos_token_ids, tokenizer.eos_token_id)
    return tokenizer.turn_end_id is not None and tokenizer.turn_end_id not in named


def manifest(checkpoint: Checkpoint, recipe: Recipe, encoder: WrittenEncoder, result: Export) -> dict[str, Any]:
    """Returns the content of `fastvlm.json`, without dates and paths: the same export gives the same bytes."""
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
        "tools": {name: version(name) for name in (*TOOLS, *(ASSET_TOOLS if recipe.has_asset else ()))},
        "parity": result.verification.as_dict(),
        "files": result.files,
    }


def manifest_recipe(recipe: Recipe, encoder: WrittenEncoder) -> dict[str, Any]:
    """Returns the manifest's recipe: enough to verify the export and to repeat it."""
    return {**recipe.as_dict(), **encoder.as_dict()}


def check_engine(recipe: Recipe, allow_lint: bool) -> None:
    """Raises UsageError if lint will certainly refuse the package, before the work begins."""
    if BLOCKWISE in {recipe.quant, *recipe.encoder.weights.values()} and not allow_lint:
        raise UsageError(
            f"quant={BLOCKWISE!r} has scales per block, which breaks a rule of the Neural Engine. Use quant='pal4', "
            "which is smaller, or pass allow_lint=True.",
            "quant",
            "allow_lint",
        )


def format_notes(folder: Path, recipe: Recipe, encoder: WrittenEncoder, allow_lint: bool) -> tuple[str, ...]:
    """Returns notes on the written package and asset. Raises PackageError for a broken rule unless `allow_lint`."""
    notes = (ASSET_NOTE,) if recipe.has_asset else ()
    if not recipe.has_package:
        return notes
    schemes = {recipe.quant, *encoder.plan.values()}
    broken = lint_notes(folder / PACKAGE_NAME, allow_lint)
    return (*broken, *engine_notes(schemes, recipe.interface.min_os), *notes)


def lint_notes(package: Path, allow_lint: bool) -> tuple[str, ...]:
    """Returns the rules of the Neural Engine that the package breaks. Raises PackageError unless `allow_lint`."""
    errors = inspect_package(package).errors
    broken = tuple(f"{finding.rule}: {finding.example} ({finding.reason})" for finding in errors)
    if broken and not allow_lint:
        raise PackageError(
            f"the package would not run on the Neural Engine: {'; '.join(broken)}. Pass allow_lint=True to write it "
            "anyway.",
            "allow_lint",
        )
    return tuple(f"breaks a rule of the Neural Engine, which was allowed: {one}" for one in broken)


def check_verification(checkpoint: Checkpoint, verification: Verification, allow_shortfall: bool) -> None:
    """Raises VerificationError if the folder falls short of its checkpoint, unless `allow_shortfall`."""
    if not (verification.passed or allow_shortfall):
        raise VerificationError(
            f"{checkpoint.name} was not exported: {'; '.join(verification.failures)}. Pass allow_shortfall=True to "
            "write it anyway.",
            "allow_shortfall",
        )


def is_trained(checkpoint: Checkpoint) -> bool:
    """Returns False for random weights, also with an adapter merged into them."""
    return RANDOM_NOTE not in checkpoint.notes


def default_destination(checkpoint: Checkpoint, recipe: Recipe) -> Path:
    """Returns the folder that is written without `out`: `MODEL-QUANT` in the current folder."""
    return Path(re.sub(r"[^\w.-]+", "-", checkpoint.name) + f"-{recipe.quant}")


def bytes_needed(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Returns an estimate of the disk space that the export needs while it is written."""
    encoder = sum(prod(info.shape) for info in tensors_under(checkpoint.tensors, APPLE_ENCODER_PREFIX).values())
    language = sum(prod(shape) for shape in language_shapes(checkpoint.config).values())
    scheme, decoder = recipe.decoder, checkpoint.config.decoder
    half = 0 if scheme.quantize_embeddings or not scheme.is_quantized else decoder.vocab_size * decoder.hidden_size
    per_weight = ENCODER_BYTES_PER_WEIGHT + (ASSET_BYTES_PER_WEIGHT if recipe.has_asset else 0)
    written = encoder * per_weight + 2 * half + (language - half) * scheme.bits_per_weight / 8
    return int(written) + OTHER_BYTES
