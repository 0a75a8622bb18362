"""The verification of an exported folder against its checkpoint, with a floor for each scheme.

The saved package runs in the executor with every result rounded to float16, as on the Neural Engine. The saved decoder
runs in MLX. Outputs and weights of both are compared with the checkpoint in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..models._mlx import mx
from ..models.blas import disable_tf32
from ..models.checkpoint import Checkpoint
from ..models.config import FastVLMConfig, check_image_size
from ..models.errors import ModelFolderError, VerificationError, listed
from ..models.files import read_json_object
from ..models.folder_layout import ASSET_NAME, CONFIG_NAME, MANIFEST_NAME, PACKAGE_NAME, saved_weights
from ..models.kv_cache import KVCache
from ..models.language import load_language, quantized_layers, settled_config
from ..models.layerwise import (
    LayerwiseDecoder,
    LayerwiseRun,
    Probe,
    Prompt,
    checkpoint_reader,
    named_parameters,
    run_layerwise,
    saved_reader,
)
from ..models.references import open_checkpoint
from ..quant.calibration import NOISE, NOISE_SEED, ImageSet, folder_images, verification_images
from ..quant.metrics import Agreement, WeightAudit, compare, kl_divergence
from ..quant.prompts import probe_prompt
from .model_folder import file_table
from .options import OnStage, silent

if TYPE_CHECKING:
    from torch import nn

    from ..models.images import Fit
    from .verify_asset import AssetVerification
    from .verify_encoder import EncoderReference, EncoderVerification

ENCODER_FLOOR_DB = {"fp16": 42.0, "pal8": 28.0, "int8": 28.0, "pal6": 16.0, "int4": 6.0, "pal4": 6.0, "mixed": 12.0,
                    "w8a8": 16.0, "bf16": 30.0, "fp32": 90.0}  # fmt: skip
"""The least SNR of `image_features` in dB by scheme, for drawings and for photographs. Encoders with the published
ranges keep 48 dB at fp16 and 33 at int8 in true size, 36 with GPTQ. Small ones keep 54 and 43 without it, 35 at w8a8,
28 at pal6 and 15 at pal4, and true size is 6 to 10 dB below. Damaged weights are found one by one, above these floors
too."""

DECODER_FLOOR_DB = {16: 45.0, 8: 25.0, 6: 15.0, 5: 10.0, 4: 6.0}
"""The least SNR of the logits in dB by the fewest bits of a layer. Rounded to nearest, the small reference decoders
reach 59, 33, 20, 14 and 7 dB or more. GPTQ reaches 4 to 6 dB more."""

FLOAT16_MAX = 65504.0

MAX_LISTED = 4
"""The most weights of one part, or files, in a message."""

CONTINUATION_TOKENS = 16
"""The most tokens of the greedy answer, which is compared token by token."""

MAX_RESIDENT_BYTES = 5e9
"""The most bytes of weights for a greedy answer, which keeps them in memory."""


@dataclass(frozen=True)
class Verification:
    """The agreement of a folder with its checkpoint, and the floors for it."""

    encoder: EncoderVerification
    """The agreement of the package, of the encoder in MLX, or of a Core AI asset without a package."""
    encoder_floor_db: float
    decoder: DecoderVerification
    asset: AssetVerification | None = None
    """The agreement of the Core AI asset, if there is one that could be run."""
    unchecked: tuple[str, ...] = ()
    """The parts that could not be run on this machine, one line each."""

    @property
    def decoder_floor_db(self) -> float:
        """The least SNR of the logits in dB."""
        return DECODER_FLOOR_DB[self.decoder.fewest_bits]

    @property
    def failures(self) -> list[str]:
        """The reasons why the folder falls short, one line each."""
        found = [*first_few(self.encoder.weights.failures), *first_few(self.decoder.weights.failures)]
        kinds = [(kind, agreement) for kind, agreement in self.encoder.kinds.items() if kind != NOISE]
        checks = (
            *((f"image_features of {kind}", agreement, self.encoder_floor_db) for kind, agreement in kinds),
            ("logits", self.decoder.logits, self.decoder_floor_db),
            *self._asset_checks,
        )
        found += [
            f"{what} reach {agreement.snr_db:.1f} dB, the floor is {floor:.0f} dB (worst row {agreement.worst_row}: "
            f"{agreement.worst_row_snr_db:.1f} dB)"
            for what, agreement, floor in checks
            if agreement.snr_db < floor
        ]
        if self.decoder.largest > FLOAT16_MAX:
            found.append(
                f"decoder layer {self.decoder.largest_layer} reaches {self.decoder.largest:.0f}, but float16 ends at "
                "65,504, so a GPU would compute NaN"
            )
        return found

    @property
    def _asset_checks(self) -> Iterator[tuple[str, Agreement, float]]:
        """Yields what is compared of an asset, with its floor. Without a package it is also the encoder."""
        from .verify_asset import ARITHMETIC_FLOOR_DB

        if self.asset is not None:
            if self.asset is not self.encoder:
                for kind, agreement in self.asset.kinds.items():
                    yield f"{ASSET_NAME}: image_features of {kind}", agreement, self.encoder_floor_db
            if self.asset.arithmetic is not None:
                what = f"{ASSET_NAME}: image_features, compared with torch with the same weights,"
                yield what, self.asset.arithmetic, ARITHMETIC_FLOOR_DB

    @property
    def passed(self) -> bool:
        """True if nothing falls short."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's `parity`."""
        largest = {"largest_activation": round(max(self.encoder.ranges.values()), 3)} if self.encoder.ranges else {}
        asset = {} if self.asset is None else {"coreai": self.asset.as_dict()}
        return {
            "image_features": {**self.encoder.output.as_dict(), "floor_db": self.encoder_floor_db, **largest},
            "kinds": {kind: agreement.as_dict() for kind, agreement in self.encoder.kinds.items()},
            "float16_load": {
                kind: {stage: _significant(share) for stage, share in shares.items()}
                for kind, shares in self.encoder.load.items()
            },
            "stages_snr_db": _rounded(self.encoder.stages),
            **({"modes_snr_db": _rounded(self.encoder.modes)} if self.encoder.modes else {}),
            "logits": {**self.decoder.as_dict(), "floor_db": self.decoder_floor_db},
            "weights": {"encoder": self.encoder.weights.as_dict(), "decoder": self.decoder.weights.as_dict()},
            **asset,
        }


def _rounded(snrs_db: Mapping[str, float | None]) -> dict[str, float | None]:
    return {what: None if snr_db is None else round(snr_db, 1) for what, snr_db in snrs_db.items()}


def _significant(share: float) -> float | None:
    """Returns three digits of `share`, or None for a value that is not finite, which JSON does not have."""
    return float(f"{share:.3g}") if np.isfinite(share) else None


def first_few(failures: Sequence[str]) -> list[str]:
    """Returns the first failures, and one line for the number of others."""
    more = [f"{len(failures) - MAX_LISTED} more weights differ"] if len(failures) > MAX_LISTED else []
    return [*failures[:MAX_LISTED], *more]


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    images: str | Path | None = None,
    on_stage: OnStage = silent,
) -> Verification:
    """Compares an exported folder with its checkpoint: files, weights, image features, logits, a greedy answer.

    Args:
        folder: an exported model folder.
        against: the checkpoint that it was exported from, as `fastvlm.export` takes it.
        adapter: the folder of the LoRA adapter that was merged into it.
        base: the checkpoint that had what `against` lacks.
        allow_pickle: True also reads pickles, as `fastvlm.export` does.
        images: a folder of images to compare on, in place of the embedded drawings and photographs.
        on_stage: a function that is called with a short description of each stage before it begins.

    Returns:
        The agreement by part. `passed` is false if the folder falls short, and `failures` has the reasons.

    Raises:
        ModelFolderError: the folder is incomplete, or does not match its manifest.
        ImageError: `images` has no image that can be read.
        VerificationError: a weight or an output is not finite, or has another shape than the checkpoint's.
        FastVLMError: the checkpoint cannot be read.
    """
    from ..models.fastvit import FastViT
    from .verify_encoder import encoder_reference

    disable_tf32()
    folder = Path(folder).expanduser()
    checkpoint = open_checkpoint(against, adapter, base=base, allow_pickle=allow_pickle)
    recipe = saved_recipe(folder)
    on_stage("compare files with the manifest")
    check_hashes(folder)
    size, fit = recipe["image_size"], cast("Fit", checkpoint.config.image_aspect_ratio)
    chosen = verification_images(size) if images is None else folder_images(images, size, fit).with_noise(NOISE_SEED)
    on_stage("run the checkpoint's encoder")
    reference = encoder_reference(FastViT.from_checkpoint(checkpoint), chosen)
    return verify_features(folder, checkpoint, chosen, reference, recipe, accumulate=True, on_stage=on_stage)


def saved_recipe(folder: Path) -> Mapping[str, Any]:
    """Returns the manifest's recipe. Raises ModelFolderError if it lacks what verification needs."""
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder. Pass one that `fastvlm export` wrote.")
    recipe = read_json_object(folder / MANIFEST_NAME, ModelFolderError).get("recipe")
    if not isinstance(recipe, Mapping) or str(recipe.get("quant")) not in ENCODER_FLOOR_DB:
        raise ModelFolderError(f"{folder / MANIFEST_NAME}: the recipe is missing or unknown. Export the model again.")
    if not isinstance(recipe.get("image_size"), int):
        raise ModelFolderError(f"{folder / MANIFEST_NAME}: the recipe has no image_size. Export the model again.")
    check_image_size(recipe["image_size"])
    scales = recipe.get("stream_scales")
    if not isinstance(scales, list) or not all(isinstance(scale, int | float) and scale > 0 for scale in scales):
        raise ModelFolderError(f"{folder / MANIFEST_NAME}: stream_scales is invalid. Export the model again.")
    return recipe


def encoder_floor_db(recipe: Mapping[str, Any]) -> float:
    """Returns the least SNR of `image_features` in dB: for `mixed` the `min_snr` of its search, if it had one."""
    promised = recipe.get("min_snr")
    return float(promised) if isinstance(promised, int | float) else ENCODER_FLOOR_DB[recipe["quant"]]


def check_hashes(folder: Path) -> None:
    """Raises ModelFolderError unless every file has the bytes that the manifest lists."""
    expected = read_json_object(folder / MANIFEST_NAME, ModelFolderError).get("files")
    found = file_table(folder)
    if not isinstance(expected, dict):
        raise ModelFolderError(f"{folder / MANIFEST_NAME}: 'files' is missing. Export the model again.")
    changed = sorted(name for name in expected.keys() | found.keys() if not _same(expected.get(name), found.get(name)))
    if changed:
        raise ModelFolderError(
            f"{folder} does not match its manifest in {listed(changed, MAX_LISTED)}: damaged, or from different "
            "exports. Export the model again."
        )


def _same(expected: Any, found: Any) -> bool:
    entries = isinstance(expected, dict) and isinstance(found, dict)
    return entries and all(expected.get(key) == found[key] for key in ("bytes", "sha256"))


def verify_features(
    folder: Path,
    checkpoint: Checkpoint,
    images: ImageSet,
    reference: EncoderReference,
    recipe: Mapping[str, Any],
    *,
    stored_features: Sequence[np.ndarray] = (),
    accumulate: bool = False,
    on_stage: OnStage,
) -> Verification:
    """Verifies a folder whose checkpoint's encoder has already run on `images`.

    Args:
        recipe: the manifest's.
        stored_features: the output with the stored weights that an asset should have (see `verify_asset`).
        accumulate: True also measures the first image with products that are summed in float16. At 1024 px FastViTHD
            takes half a minute for it.
    """
    from .coreai import INSTALL, has_coreai, require_coreai
    from .rewrite import projected
    from .verify_encoder import verify_encoder

    if recipe.get("layout") == "mlx":
        return verify_mlx(folder, checkpoint, images, reference, recipe, on_stage)
    expected = projected(checkpoint, reference.features) if recipe.get("with_projector") else reference.features
    form, asset = recipe.get("format", "coreml"), None
    unchecked: tuple[str, ...] = ()
    encoder: EncoderVerification | None = None
    if form == "coreai":
        require_coreai(f"{folder}: {ASSET_NAME}")
    else:
        on_stage("run the saved package")
        network, scales = rebuilt(checkpoint, recipe), recipe["stream_scales"]
        encoder = verify_encoder(
            folder / PACKAGE_NAME, images, reference, expected, network, scales, accumulate=accumulate
        )
        del network
    if form != "coreml" and has_coreai():
        asset = run_asset(folder, images, expected, recipe, stored_features, on_stage)
    elif form != "coreml":
        unchecked = (f"{ASSET_NAME}, which needs Apple's packages. Run `{INSTALL}`",)
    on_stage("run the saved decoder")
    decoder = verify_decoder(folder, checkpoint, reference.features[0])
    found = encoder or asset
    assert found is not None
    return Verification(found, encoder_floor_db(recipe), decoder, asset, unchecked)


def run_asset(
    folder: Path,
    images: ImageSet,
    expected: Sequence[np.ndarray],
    recipe: Mapping[str, Any],
    stored_features: Sequence[np.ndarray],
    on_stage: OnStage,
) -> AssetVerification:
    """Runs a folder's asset in Apple's interpreter: see `verify_asset`."""
    from .recipe import interface_for
    from .verify_asset import judged_places, verify_asset

    count = len(judged_places(images))
    on_stage(f"run Core AI on {count} image{'s'[: count > 1]}{', in minutes at 1024 px' * (count == 1)}")
    interface = interface_for([recipe["quant"]], saved=recipe)
    return verify_asset(folder / ASSET_NAME, images, expected, interface, stored_features)


def verify_mlx(
    folder: Path,
    checkpoint: Checkpoint,
    images: ImageSet,
    reference: EncoderReference,
    recipe: Mapping[str, Any],
    on_stage: OnStage,
) -> Verification:
    """Verifies a folder that has its encoder in MLX: see `verify_features`."""
    from ..models.fastvit import FastViT
    from .mlx_encoder import verify_mlx_encoder

    on_stage("run the saved encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    found = verify_mlx_encoder(folder, images, reference, encoder, str(recipe["quant"]))
    del encoder
    on_stage("run the saved decoder")
    return Verification(found, encoder_floor_db(recipe), verify_decoder(folder, checkpoint, reference.features[0]))


def rebuilt(checkpoint: Checkpoint, recipe: Mapping[str, Any]) -> nn.Module:
    """Returns the network that the package was made from, with its weights uncompressed, from the checkpoint again."""
    from ..models.fastvit import FastViT
    from .evening import even_channels, from_digits
    from .recipe import interface_for
    from .write_encoder import rewritten

    interface, encoder = interface_for([recipe["quant"]], saved=recipe), FastViT.from_checkpoint(checkpoint)
    network = rewritten(encoder, checkpoint, recipe["image_size"], interface, recipe["stream_scales"])
    even_channels(network, {name: from_digits(digits) for name, digits in recipe.get("evened", {}).items()})
    return network


@dataclass(frozen=True)
class DecoderVerification:
    """The agreement of an exported decoder with the checkpoint's."""

    logits: Agreement
    """The agreement at every position after the image: the rest of the prompt, and the greedy answer."""
    kl: float
    """The KL divergence between the distributions over the next token there, in nats."""
    greedy_tokens: int
    """The length of that answer."""
    greedy_same: float | None
    """The share of its ids that are also the checkpoint's likeliest, after the same answer so far."""
    greedy_prefix: int
    """The number of ids before the first difference."""
    largest: float
    """The largest magnitude inside. A GPU computes it in float16."""
    largest_layer: int
    fewest_bits: int
    weights: WeightAudit

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's figures of the logits."""
        return {
            **self.logits.as_dict(),
            "kl": round(self.kl, 6),
            "greedy_tokens": self.greedy_tokens,
            "greedy_same": None if self.greedy_same is None else round(self.greedy_same, 6),
            "greedy_prefix": self.greedy_prefix,
            "largest_activation": round(self.largest, 3),
        }


def verify_decoder(folder: Path, checkpoint: Checkpoint, image_features: np.ndarray) -> DecoderVerification:
    """Runs the exported and the checkpoint's decoder and projector, in float32, on a question about an image.

    Args:
        image_features: (1, N, C).

    Raises:
        VerificationError: weights or logits are not finite, or the folder has a decoder of other dimensions.
    """
    config = FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME, ModelFolderError))
    weights = saved_weights(folder)
    config = settled_config(weights, config, config.quantization)
    _check_dimensions(config, checkpoint.config)
    rows = min(config.decoder.vocab_size, checkpoint.config.decoder.vocab_size)
    prompt = probe_prompt((folder / "tokenizer.json").read_bytes(), image_features, rows)
    answer = greedy_answer(weights, config, prompt)
    asked, audit, bits = prompt.continued(answer[:-1]), WeightAudit(), layer_bits(weights, config)
    original, saved = run_both(
        LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config),
        LayerwiseDecoder(saved_reader(weights, config), config),
        asked,
        audit,
        bits,
    )
    agreement = compare(original.logits, saved.logits, "logits")
    same = original.logits[-len(answer) :].argmax(-1) == np.array(answer) if answer else np.empty(0, bool)
    return DecoderVerification(
        logits=agreement,
        kl=kl_divergence(original.logits, saved.logits),
        greedy_tokens=len(answer),
        greedy_same=float(same.mean()) if answer else None,
        greedy_prefix=len(answer) if same.all() else int(same.argmin()),
        largest=saved.largest,
        largest_layer=saved.largest_layer,
        fewest_bits=min(bits.values(), default=16),
        weights=audit,
    )


def greedy_answer(weights: Mapping[str, mx.array], config: FastVLMConfig, prompt: Prompt) -> list[int]:
    """Returns the ids of the exported decoder's greedy answer, up to its end or `CONTINUATION_TOKENS`.

    The prompt is computed layer by layer with weights expanded to float32, single tokens with the stored weights. The
    answer is empty if the weights have more than `MAX_RESIDENT_BYTES`.
    """
    if sum(array.nbytes for array in weights.values()) > MAX_RESIDENT_BYTES:
        return []
    caches = [KVCache() for _ in range(config.decoder.num_hidden_layers)]
    probe = run_layerwise(LayerwiseDecoder(saved_reader(dict(weights), config), config), prompt, caches)
    side = load_language(weights, config, quantization=config.quantization, expand=False)
    decoder, answer = side.language_model, [int(probe.logits[-1].argmax())]
    while len(answer) < CONTINUATION_TOKENS and answer[-1] not in config.eos_token_ids:
        logits = decoder(decoder.embed(mx.array([answer[-1:]])).astype(mx.float32), caches)  # (1, 1, vocabulary)
        answer.append(int(np.array(logits[0, -1]).argmax()))
    return answer


def run_both(
    original: LayerwiseDecoder, saved: LayerwiseDecoder, prompt: Prompt, audit: WeightAudit, bits: Mapping[str, int]
) -> tuple[Probe, Probe]:
    """Runs both, and compares each weight when it is read. `bits` is by saved layer name, and 16 for other layers."""
    runs = LayerwiseRun(original, prompt), LayerwiseRun(saved, prompt)
    for (name, expected), (_, found) in zip(*(run.parts() for run in runs), strict=True):
        if isinstance(expected, mx.array):
            _add(audit, name, expected, found, bits)
            continue
        tensors = named_parameters(found)
        for own, tensor in named_parameters(expected).items():
            _add(audit, f"{name}.{own}", tensor, tensors[own], bits)
    first, second = (run.probe for run in runs)
    assert first is not None and second is not None
    return first, second


def layer_bits(weights: Mapping[str, mx.array], config: FastVLMConfig) -> dict[str, int]:
    """Returns the bits of each quantized layer, by its saved name."""
    if config.quantization is None:
        return {}
    return {layer: config.quantization.of(layer).bits for layer in quantized_layers(weights)}


def _add(audit: WeightAudit, name: str, expected: mx.array, found: mx.array, bits: Mapping[str, int]) -> None:
    stored = bits.get(name.removesuffix(".weight"), 16)
    if stored == 16:
        expected = expected.astype(mx.float16)
    audit.add(name, np.array(expected, copy=False), np.array(found, copy=False), stored)


def _check_dimensions(saved: FastVLMConfig, expected: FastVLMConfig) -> None:
    """Raises VerificationError if the folder cannot come from the checkpoint."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    pairs = [(name, getattr(saved.decoder, name), getattr(expected.decoder, name)) for name in names]
    pairs += [(name, getattr(saved, name), getattr(expected, name)) for name in ("mm_hidden_size",)]
    pairs += [("tie_word_embeddings", saved.decoder.tie_word_embeddings, expected.decoder.tie_word_embeddings)]
    for name, found, wanted in pairs:
        if found != wanted:
            raise VerificationError(
                f"the folder is another model's export ({name} is {found}, but {wanted} in the checkpoint). Pass the "
                "checkpoint that it was exported from."
            )
