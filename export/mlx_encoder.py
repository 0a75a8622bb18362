"""The vision encoder as MLX weights in the decoder's file, under mlx-vlm's names: `encoder="mlx"`.

The written encoder is verified in MLX, against the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..models._mlx import mx
from ..models.checkpoint import Checkpoint, check_tensors, iter_float_tensors
from ..models.errors import WeightsError
from ..models.fastvit_mlx import FastViTMLX
from ..models.folder_layout import ASSET_NAME, PACKAGE_NAME, folder_bytes, saved_encoder
from ..models.tensor_names import (
    APPLE_ENCODER_PREFIX,
    HEAD_PROJECTION,
    MLX_ENCODER_PREFIX,
    PROJECTION_DIM,
    UNUSED_ENCODER_TENSORS,
    renamed,
    to_mlx_axes,
)
from ..quant.calibration import ImageSet, verification_images
from ..quant.metrics import WeightAudit, compare
from .options import OnStage
from .recipe import MLX_DTYPES, Recipe
from .verify_encoder import (
    ALL,
    EncoderReference,
    EncoderVerification,
    agreements,
    encoder_reference,
    reference_features,
)
from .write_encoder import WrittenEncoder

if TYPE_CHECKING:
    from ..models.fastvit import FastViT

DTYPES = dict(zip(MLX_DTYPES, (mx.bfloat16, mx.float32), strict=True))

UNUSED_STATE = "num_batches_tracked"
"""The end of the names of batch norm's counters, which no client loads."""


def read_encoder(checkpoint: Checkpoint, recipe: Recipe, calibration: ImageSet, on_stage: OnStage) -> WrittenEncoder:
    """Runs and reparameterizes the checkpoint's encoder. Its tensors are written later, with the decoder's."""
    from ..models.fastvit import FastViT

    on_stage("load the encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    on_stage("run the checkpoint's encoder")
    images = verification_images(recipe.image_size)
    reference = encoder_reference(encoder, images)
    features = reference_features(encoder, calibration) if recipe.decoder.needs_calibration else []
    tensors = stored_tensors(encoder.reparameterize(), checkpoint, recipe.quant)
    return WrittenEncoder(images, reference, calibration, features, tensors=tensors)


def stored_tensors(encoder: FastViT, checkpoint: Checkpoint, quant: str) -> Iterator[tuple[str, mx.array]]:
    """Yields (name, array) of every tensor that clients load for the encoder, rounded to the type `quant`.

    Raises:
        WeightsError: a tensor is not finite.
    """
    dtype = DTYPES[quant]
    for name, values in reparameterized_tensors(encoder):
        yield MLX_ENCODER_PREFIX + name, mx.array(values).astype(dtype)
    yield MLX_ENCODER_PREFIX + HEAD_PROJECTION, head_projection(encoder, checkpoint).astype(dtype)


def reparameterized_tensors(encoder: FastViT) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name without the tower's prefix, float32 array) of a reparameterized encoder, channels last."""
    for name, tensor in encoder.state_dict().items():
        if not name.endswith(UNUSED_STATE):
            named = renamed(APPLE_ENCODER_PREFIX + name, "apple", "mlx").removeprefix(MLX_ENCODER_PREFIX)
            yield named, tensor.numpy().transpose(to_mlx_axes(tuple(tensor.shape)))  # (O, ..., I)


def with_encoder(
    encoder: Iterable[tuple[str, mx.array]], language: Iterable[tuple[str, mx.array]]
) -> Iterator[tuple[str, mx.array]]:
    """Yields the encoder's tensors, then those of decoder and projector (saved names) under mlx-vlm's names."""
    yield from encoder
    for name, tensor in language:
        yield renamed(name, "saved", "mlx"), tensor


def head_projection(encoder: FastViT, checkpoint: Checkpoint) -> mx.array:
    """Returns CLIP's head, which clients load but FastVLM does not run: zeros if the checkpoint lacks it.

    Raises:
        WeightsError: it is not finite.
    """
    name, channels = APPLE_ENCODER_PREFIX + HEAD_PROJECTION, encoder.config.out_channels
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2 or info.shape[0] != channels:
        return mx.zeros((channels, PROJECTION_DIM))
    ((_, values),) = iter_float_tensors(checkpoint, [name], "mlx")
    head = mx.array(values)
    if not mx.isfinite(head).all().item():
        raise WeightsError(f"{name}: NaN or infinite values. The checkpoint is damaged.")
    return head


@dataclass(frozen=True)
class MLXVerification(EncoderVerification):
    """The same for an encoder in MLX, whose `ranges` are of float32 results and need no warning."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user: none."""
        return ()


def verify_mlx_encoder(
    folder: Path, images: ImageSet, reference: EncoderReference, encoder: FastViT, quant: str
) -> MLXVerification:
    """Runs the saved encoder in MLX, in float32, and compares it with the checkpoint's `encoder`.

    Raises:
        WeightsError: the saved tensors are not a whole encoder, or not finite.
        VerificationError: they have other shapes than the checkpoint's.
    """
    saved = saved_encoder(folder)
    audit = audit_tensors(saved, encoder.reparameterize(), quant)
    network = FastViTMLX.from_tensors(saved, mx.float32)
    outputs: list[np.ndarray] = []
    stages: dict[str, float] = {}
    ranges: dict[str, float] = {}
    for image in images:
        found = {name: np.array(result) for name, result in network.results(mx.array(image))}
        outputs.append(found.pop("image_features"))
        stages = stages or {
            stage: compare(reference.stages[stage], result.transpose(0, 3, 1, 2), stage).snr_db  # (1, C, H, W)
            for stage, result in found.items()
        }
        for name, result in found.items():
            ranges[name] = max(ranges.get(name, 0.0), float(np.abs(result).max()))
    kinds = agreements(images, reference.features, outputs, "image_features")
    return MLXVerification(kinds.pop(ALL), stages, audit, ranges, kinds)


def audit_tensors(saved: dict[str, mx.array], encoder: FastViT, quant: str) -> WeightAudit:
    """Compares every saved tensor with the reparameterized `encoder`. Raises WeightsError over names or shapes."""
    expected, audit = dict(reparameterized_tensors(encoder)), WeightAudit()
    kept = {name: tensor for name, tensor in saved.items() if not name.startswith(UNUSED_ENCODER_TENSORS)}
    check_tensors(
        {name: values.shape for name, values in expected.items()},
        {name: tensor.shape for name, tensor in kept.items()},
        "MLX vision encoder",
    )
    for name, values in expected.items():
        rounded = np.array(mx.array(values).astype(DTYPES[quant]).astype(mx.float32))
        audit.add(f"encoder {name}", rounded, np.array(kept[name].astype(mx.float32)), bits=16)
    return audit


def encoder_bytes(folder: Path) -> int:
    """Returns the bytes of the encoder in an exported folder: its package, else its Core AI asset, or in MLX."""
    for name in (PACKAGE_NAME, ASSET_NAME):
        if (folder / name).is_dir():
            return folder_bytes(folder / name)
    return sum(tensor.nbytes for tensor in saved_encoder(folder).values())
