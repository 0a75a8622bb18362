"""Whether an exported folder still computes what its checkpoint does: run, compared, judged by a floor per scheme.

The saved package runs in the reference executor with every result rounded to float16, as on the engine; the saved
decoder runs in MLX. Both are compared with the checkpoint in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.checkpoint import Checkpoint
from ..models.config import FastVLMConfig
from ..models.errors import ModelFolderError, VerificationError
from ..models.folder_layout import CONFIG_NAME, INPUT_NAME, MANIFEST_NAME, OUTPUT_NAME, PACKAGE_NAME, saved_weights
from ..models.json_file import read_json_object
from ..models.references import open_checkpoint
from ..quant.calibration import verification_images
from ..quant.metrics import Agreement, compare

if TYPE_CHECKING:
    from ..models.fastvit import FastViT

ENCODER_FLOOR_DB = {"fp16": 50.0, "int8": 30.0}
"""SNR of `image_features` below which a package is refused. The small reference encoders reach 60 and 40 dB."""
DECODER_FLOOR_DB = {16: 45.0, 8: 25.0, 4: 6.0}
"""SNR of the logits by bits. Random weights, which have no outliers to protect, reach 70, 35 and 12 dB."""

PROBE_TOKENS = 24
"""Text positions in the decoder's probe, a third of them before the image."""


@dataclass(frozen=True)
class Verification:
    """What a folder reached next to its checkpoint, and the floors that it was held to."""

    encoder: Agreement
    encoder_floor_db: float
    decoder: Agreement
    decoder_floor_db: float

    @property
    def failures(self) -> list[str]:
        checks = (
            ("image_features", self.encoder, self.encoder_floor_db),
            ("logits", self.decoder, self.decoder_floor_db),
        )
        return [
            f"{what} reach {agreement.snr_db:.1f} dB, the floor is {floor:.0f} dB (worst row {agreement.worst_row}: "
            f"{agreement.worst_row_snr_db:.1f} dB)"
            for what, agreement, floor in checks
            if agreement.snr_db < floor
        ]

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_features": {**self.encoder.as_dict(), "floor_db": self.encoder_floor_db},
            "logits": {**self.decoder.as_dict(), "floor_db": self.decoder_floor_db},
        }


def verify(
    folder: str | Path, against: str | Path, *, on_stage: Callable[[str], None] = lambda _: None
) -> Verification:
    """Compares an exported folder with the checkpoint that it should come from.

    Raises:
        ModelFolderError: the folder is incomplete.
        VerificationError: an output is not finite, or of another shape than the checkpoint's.
    """
    folder, checkpoint = Path(folder), open_checkpoint(against)
    manifest = read_json_object(folder / MANIFEST_NAME, ModelFolderError)
    recipe = manifest.get("recipe")
    if not isinstance(recipe, Mapping) or recipe.get("quant") not in ENCODER_FLOOR_DB:
        raise ModelFolderError(f"{folder / MANIFEST_NAME} does not name its recipe: export the folder again")
    from ..models.fastvit import FastViT

    images = verification_images(int(recipe["image_size"]))
    on_stage("run the checkpoint's encoder")
    features, _ = reference_features(FastViT.from_checkpoint(checkpoint), images)
    return verify_features(folder, checkpoint, images, features, recipe["quant"], on_stage=on_stage)


def verify_features(
    folder: Path,
    checkpoint: Checkpoint,
    images: Sequence[np.ndarray],
    features: Sequence[np.ndarray],
    quant: str,
    *,
    on_stage: Callable[[str], None],
) -> Verification:
    """`verify` for a checkpoint whose `image_features` of `images` are at hand."""
    on_stage("run the saved package")
    encoder = verify_encoder(folder / PACKAGE_NAME, images, features)
    on_stage("run the saved decoder")
    decoder, bits = verify_decoder(folder, checkpoint, features[0])
    return Verification(encoder, ENCODER_FLOOR_DB[quant], decoder, DECODER_FLOOR_DB[bits])


def reference_features(encoder: FastViT, images: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """`image_features` (1, N, C) of each image in float32, and the stages' largest magnitudes over all of them."""
    import torch

    from .rewrite import features_and_maxima

    with torch.inference_mode():
        results = [features_and_maxima(encoder, torch.from_numpy(image)) for image in images]
    return [features.numpy() for features, _ in results], [max(m) for m in zip(*(m for _, m in results), strict=True)]


def verify_encoder(package: Path, images: Sequence[np.ndarray], features: Sequence[np.ndarray]) -> Agreement:
    """Runs the saved package in float16 on `images` and compares with `features`."""
    from ..models.mlprogram.executor import Executor

    executor = Executor(package, precision="float16")
    outputs = []
    for image in images:
        outputs.append(executor.run({INPUT_NAME: image})[OUTPUT_NAME])
        if executor.first_overflow:
            raise VerificationError(
                f"the package overflows float16, first at {executor.first_overflow}: on the Neural Engine it would "
                "give NaN or infinite features"
            )
    return compare(np.concatenate(features), np.concatenate(outputs), "image_features")


def verify_decoder(folder: Path, checkpoint: Checkpoint, image_features: np.ndarray) -> tuple[Agreement, int]:
    """Runs the saved decoder and projector next to the checkpoint's, in float32; returns the saved bits too."""
    from ..models._mlx import mx
    from ..models.language import settled_config
    from ..models.layerwise import checkpoint_reader, layerwise_logits, saved_reader

    config = FastVLMConfig.from_dict(read_json_object(folder / CONFIG_NAME, ModelFolderError))
    weights = saved_weights(folder)
    config = settled_config(weights, config, config.quantization)
    vocab_size = min(config.decoder.vocab_size, checkpoint.config.decoder.vocab_size)
    ids = np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, PROBE_TOKENS).tolist()
    before, after = ids[: PROBE_TOKENS // 3], ids[PROBE_TOKENS // 3 :]
    readers = (
        (checkpoint_reader(checkpoint), checkpoint.config),
        (saved_reader(weights, config), config),
    )
    features = mx.array(image_features)
    original, saved = (np.array(layerwise_logits(read, c, before, features, after)) for read, c in readers)
    return compare(original, saved, "logits"), config.quantization[1] if config.quantization else 16
