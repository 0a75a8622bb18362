"""Whether an exported folder still computes what its checkpoint does: run, compared, judged by a floor per scheme.

The saved package runs in the reference executor with every result rounded to float16, as on the engine; the saved
decoder runs in MLX. Both are compared with the checkpoint in float32: what they give, and the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..models.checkpoint import Checkpoint
from ..models.config import check_image_size
from ..models.errors import ModelFolderError
from ..models.files import read_json_object
from ..models.float32 import disable_tf32
from ..models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from ..models.references import open_checkpoint
from ..quant.calibration import folder_images, verification_images
from .model_folder import file_table
from .verify_decoder import DecoderVerification, verify_decoder

if TYPE_CHECKING:
    from torch import nn

    from ..models.images import Fit
    from .verify_encoder import EncoderReference, EncoderVerification

ENCODER_FLOOR_DB = {"fp16": 50.0, "pal8": 35.0, "int8": 30.0, "pal6": 22.0, "int4": 12.0, "pal4": 12.0, "mixed": 12.0,
                    "w8a8": 22.0, "bf16": 30.0, "fp32": 90.0}  # fmt: skip
"""SNR of `image_features` below which a package falls short: below what the trained `tiny` keeps (51 dB at fp16, 32 at
int8, 26 at pal6 and w8a8, 14 at pal4), which is less than what the small reference encoders do."""
DECODER_FLOOR_DB = {16: 45.0, 8: 25.0, 6: 15.0, 5: 10.0, 4: 6.0}
"""SNR of the logits by the fewest bits of a layer. To the nearest level the small reference decoders reach 59, 33, 20,
14 and 7 dB or more, with GPTQ 4 to 6 more."""
FLOAT16_MAX = 65504.0

MAX_LISTED = 4


@dataclass(frozen=True)
class Verification:
    """What a folder reached next to its checkpoint, and the floors that it was held to."""

    encoder: EncoderVerification
    encoder_floor_db: float
    decoder: DecoderVerification

    @property
    def decoder_floor_db(self) -> float:
        return DECODER_FLOOR_DB[self.decoder.fewest_bits]

    @property
    def failures(self) -> list[str]:
        found = [*listed(self.encoder.weights.failures), *listed(self.decoder.weights.failures)]
        checks = (
            ("image_features", self.encoder.output, self.encoder_floor_db),
            ("logits", self.decoder.logits, self.decoder_floor_db),
        )
        found += [
            f"{what} reach {agreement.snr_db:.1f} dB, the floor is {floor:.0f} dB (worst row {agreement.worst_row}: "
            f"{agreement.worst_row_snr_db:.1f} dB)"
            for what, agreement, floor in checks
            if agreement.snr_db < floor
        ]
        if self.decoder.largest > FLOAT16_MAX:
            found.append(
                f"decoder layer {self.decoder.largest_layer} reaches {self.decoder.largest:.0f}, and float16 ends at "
                "65,504: on a GPU it would give NaN"
            )
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_features": {
                **self.encoder.output.as_dict(),
                "floor_db": self.encoder_floor_db,
                "largest_activation": round(max(self.encoder.ranges.values()), 3),
            },
            "stages_snr_db": {stage: round(snr_db, 1) for stage, snr_db in self.encoder.stages.items()},
            "logits": {**self.decoder.as_dict(), "floor_db": self.decoder_floor_db},
            "weights": {"encoder": self.encoder.weights.as_dict(), "decoder": self.decoder.weights.as_dict()},
        }


def listed(failures: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = [f"{len(failures) - MAX_LISTED} more weights differ"] if len(failures) > MAX_LISTED else []
    return [*failures[:MAX_LISTED], *more]


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    adapter: str | Path | None = None,
    images: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Compares an exported folder with the checkpoint that it should come from, on a folder of `images` or on ours.

    `adapter` is the folder of the LoRA adapter that was merged into it.

    Raises:
        ModelFolderError: the folder is incomplete.
        ImageError: no image can be read.
        VerificationError: a weight or an output is not finite, or of another shape than the checkpoint's.
    """
    from ..models.fastvit import FastViT
    from .verify_encoder import encoder_reference

    disable_tf32()
    folder, checkpoint = Path(folder).expanduser(), open_checkpoint(against, adapter)
    recipe = saved_recipe(folder)
    on_stage("compare files with the manifest")
    check_hashes(folder)
    size, fit = recipe["image_size"], cast("Fit", checkpoint.config.image_aspect_ratio)
    chosen = verification_images(size) if images is None else folder_images(images, size, fit)
    on_stage("run the checkpoint's encoder")
    reference = encoder_reference(FastViT.from_checkpoint(checkpoint), chosen)
    return verify_features(folder, checkpoint, chosen, reference, recipe, on_stage=on_stage)


def saved_recipe(folder: Path) -> Mapping[str, Any]:
    """What the manifest says of the export. Raises ModelFolderError when it does not say enough to verify it."""
    recipe = read_json_object(folder / MANIFEST_NAME, ModelFolderError).get("recipe")
    if not isinstance(recipe, Mapping) or str(recipe.get("quant")) not in ENCODER_FLOOR_DB:
        raise ModelFolderError(f"{folder / MANIFEST_NAME} does not name its recipe: export the model again")
    if not isinstance(recipe.get("image_size"), int):
        raise ModelFolderError(f"{folder / MANIFEST_NAME} names no image size: export the model again")
    check_image_size(recipe["image_size"])
    scales = recipe.get("stream_scales")
    if not isinstance(scales, list) or not all(isinstance(scale, int | float) and scale > 0 for scale in scales):
        raise ModelFolderError(f"{folder / MANIFEST_NAME} names no scales of the stages: export the model again")
    return recipe


def encoder_floor_db(recipe: Mapping[str, Any]) -> float:
    """What `image_features` should reach: for `mixed` the SNR that it was searched for, where it was for one."""
    promised = recipe.get("min_snr")
    return float(promised) if isinstance(promised, int | float) else ENCODER_FLOOR_DB[recipe["quant"]]


def check_hashes(folder: Path) -> None:
    """Raises ModelFolderError unless every file is, to the byte, what the manifest says."""
    listed = read_json_object(folder / MANIFEST_NAME, ModelFolderError).get("files")
    found = file_table(folder)
    if not isinstance(listed, dict):
        raise ModelFolderError(f"{folder / MANIFEST_NAME} lists no files: export the model again")
    changed = sorted(name for name in listed.keys() | found.keys() if not _same(listed.get(name), found.get(name)))
    if changed:
        raise ModelFolderError(
            f"{folder} does not match its manifest in {', '.join(changed[:4])}: damaged, or from different exports; "
            "export the model again"
        )


def _same(listed: Any, found: Any) -> bool:
    entries = isinstance(listed, dict) and isinstance(found, dict)
    return entries and all(listed.get(key) == found[key] for key in ("bytes", "sha256"))


def verify_features(
    folder: Path,
    checkpoint: Checkpoint,
    images: Sequence[np.ndarray],
    reference: EncoderReference,
    recipe: Mapping[str, Any],
    *,
    on_stage: Callable[[str], None],
) -> Verification:
    """`verify` for a checkpoint whose encoder has been run on `images`. `recipe` is what the manifest says of it."""
    from .projector import projected
    from .verify_encoder import verify_encoder

    if recipe.get("layout") == "mlx":
        return verify_mlx(folder, checkpoint, images, reference, recipe, on_stage)
    on_stage("run the saved package")
    scales = recipe["stream_scales"]
    network = rebuilt(checkpoint, recipe)
    expected = projected(checkpoint, reference.features) if recipe.get("with_projector") else reference.features
    encoder = verify_encoder(folder / PACKAGE_NAME, images, reference, expected, network, scales)
    del network
    on_stage("run the saved decoder")
    return Verification(encoder, encoder_floor_db(recipe), verify_decoder(folder, checkpoint, reference.features[0]))


def verify_mlx(
    folder: Path,
    checkpoint: Checkpoint,
    images: Sequence[np.ndarray],
    reference: EncoderReference,
    recipe: Mapping[str, Any],
    on_stage: Callable[[str], None],
) -> Verification:
    """`verify_features` for a folder that holds its encoder in MLX."""
    from ..models.fastvit import FastViT
    from .mlx_encoder import verify_mlx_encoder

    on_stage("run the saved encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    found = verify_mlx_encoder(folder, images, reference, encoder, str(recipe["quant"]))
    del encoder
    on_stage("run the saved decoder")
    return Verification(found, encoder_floor_db(recipe), verify_decoder(folder, checkpoint, reference.features[0]))


def rebuilt(checkpoint: Checkpoint, recipe: Mapping[str, Any]) -> nn.Module:
    """The network that the package was made from, before its weights were compressed; from the checkpoint, anew."""
    from ..models.fastvit import FastViT
    from .interface import interface_for
    from .write_encoder import rewritten

    interface, encoder = interface_for([recipe["quant"]], saved=recipe), FastViT.from_checkpoint(checkpoint)
    return rewritten(encoder, checkpoint, recipe["image_size"], interface, recipe["stream_scales"])
