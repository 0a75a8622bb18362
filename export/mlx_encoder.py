"""The vision encoder as MLX weights beside the decoder, under mlx-vlm's names: `--layout mlx`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models._mlx import mx
from ..models.checkpoint import Checkpoint, check_tensors, iter_float_tensors
from ..models.errors import UsageError, WeightsError
from ..models.fastvit_mlx import FastViTMLX
from ..models.folder_layout import PACKAGE_NAME, saved_encoder
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
from ..quant.encoder_scheme import EncoderScheme
from ..quant.metrics import WeightAudit, compare
from .recipe import Recipe
from .verify_encoder import EncoderReference, EncoderVerification, encoder_reference, reference_features
from .write_encoder import WrittenEncoder

if TYPE_CHECKING:
    from ..models.fastvit import FastViT

DTYPES = {"bf16": mx.bfloat16, "fp32": mx.float32}
"""No float16: clients compute in the type that the weights are stored in, and trained weights overflow it inside."""


@dataclass(frozen=True)
class MLXScheme(EncoderScheme):
    """How an encoder in MLX is stored. Raises UsageError for an unknown type."""

    quant: str = "bf16"

    def __post_init__(self) -> None:
        if self.quant not in DTYPES:
            raise UsageError(
                f"--layout mlx takes --quant {' or '.join(DTYPES)}; found {self.quant!r:.40}. "
                "Fewer bits are for the package of --layout apple"
            )

    def as_dict(self) -> dict[str, Any]:
        return {"layout": "mlx", "quant": self.quant}


def mlx_scheme(quant: str | None, refused: Mapping[str, object]) -> MLXScheme:
    """The scheme of an export with `--layout mlx`. Raises UsageError when an option of `refused` was given."""
    given = [option for option, value in refused.items() if value is not None]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} is about the Core ML package, which --layout mlx does not write: leave it out")
    return MLXScheme() if quant is None else MLXScheme(quant)


def read_encoder(
    checkpoint: Checkpoint, recipe: Recipe, calibration: ImageSet, on_stage: Callable[[str], None]
) -> WrittenEncoder:
    """Runs and reparameterizes the checkpoint's encoder; its tensors are then written beside the decoder's."""
    from ..models.fastvit import FastViT

    on_stage("load the encoder")
    encoder = FastViT.from_checkpoint(checkpoint)
    on_stage("run the checkpoint's encoder")
    images = verification_images(recipe.image_size)
    reference = encoder_reference(encoder, images)
    features = reference_features(encoder, calibration) if recipe.decoder.needs_calibration else []
    tensors = stored_tensors(encoder.reparameterize(), checkpoint, recipe.quant)
    return WrittenEncoder(images, reference, calibration, features, {}, [], {}, tensors)


def stored_tensors(encoder: FastViT, checkpoint: Checkpoint, quant: str) -> Iterator[tuple[str, mx.array]]:
    """(name, array) of everything that clients expect of the encoder, rounded to the type `quant`.

    Raises:
        WeightsError: a tensor is not finite.
    """
    dtype = DTYPES[quant]
    for name, values in reparameterized_tensors(encoder):
        yield MLX_ENCODER_PREFIX + name, mx.array(values).astype(dtype)
    yield MLX_ENCODER_PREFIX + HEAD_PROJECTION, head_projection(encoder, checkpoint).astype(dtype)


def reparameterized_tensors(encoder: FastViT) -> Iterator[tuple[str, np.ndarray]]:
    """(name without the tower's prefix, float32 array) of a reparameterized encoder, channels last."""
    for name, tensor in encoder.state_dict().items():
        if not name.endswith(UNUSED_STATE):
            named = renamed(APPLE_ENCODER_PREFIX + name, "apple", "mlx").removeprefix(MLX_ENCODER_PREFIX)
            yield named, tensor.numpy().transpose(to_mlx_axes(tuple(tensor.shape)))


UNUSED_STATE = "num_batches_tracked"


def beside_encoder(
    encoder: Iterable[tuple[str, mx.array]], language: Iterable[tuple[str, mx.array]]
) -> Iterator[tuple[str, mx.array]]:
    """The encoder's tensors, then decoder and projector (saved names), as mlx-vlm calls them."""
    yield from encoder
    for name, tensor in language:
        yield renamed(name, "saved", "mlx"), tensor


def head_projection(encoder: FastViT, checkpoint: Checkpoint) -> mx.array:
    """CLIP's head, which FastVLM does not run but clients load: the checkpoint's, or zeros where it has none."""
    name, channels = APPLE_ENCODER_PREFIX + HEAD_PROJECTION, encoder.config.out_channels
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2 or info.shape[0] != channels:
        return mx.zeros((channels, PROJECTION_DIM))
    ((_, values),) = iter_float_tensors(checkpoint, [name], "mlx")
    head = mx.array(values)
    if not mx.isfinite(head).all().item():
        raise WeightsError(f"{name} holds NaN or infinite values: the checkpoint is damaged")
    return head


def encoder_bytes(folder: Path) -> int:
    """What the encoder takes up in an exported folder, as a package or in MLX."""
    package = folder / PACKAGE_NAME
    if package.is_dir():
        return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    return sum(tensor.nbytes for tensor in saved_encoder(folder).values())


@dataclass(frozen=True)
class MLXVerification(EncoderVerification):
    """As `EncoderVerification`; `ranges` are of float32 results, which have room to spare."""

    @property
    def notes(self) -> tuple[str, ...]:
        return ()


def verify_mlx_encoder(
    folder: Path, images: Sequence[np.ndarray], reference: EncoderReference, encoder: FastViT, quant: str
) -> MLXVerification:
    """Runs the saved encoder in MLX, in float32, next to the checkpoint's `encoder`.

    Raises:
        WeightsError: the saved tensors are not a whole encoder, or not finite.
        VerificationError: they are of other shapes than the checkpoint's.
    """
    saved = saved_encoder(folder)
    audit = audit_weights(saved, encoder.reparameterize(), quant)
    network = FastViTMLX.from_tensors(saved, mx.float32)
    outputs: list[np.ndarray] = []
    stages: dict[str, float] = {}
    ranges: dict[str, float] = {}
    for image in images:
        found = {name: np.array(result) for name, result in network.results(mx.array(image))}
        outputs.append(found.pop("image_features"))
        stages = stages or {
            stage: compare(reference.stages[stage], result.transpose(0, 3, 1, 2), stage).snr_db
            for stage, result in found.items()
        }
        for name, result in found.items():
            ranges[name] = max(ranges.get(name, 0.0), float(np.abs(result).max()))
    agreement = compare(np.concatenate(reference.features), np.concatenate(outputs), "image_features")
    return MLXVerification(agreement, stages, audit, ranges)


def audit_weights(saved: dict[str, mx.array], encoder: FastViT, quant: str) -> WeightAudit:
    """Every saved tensor next to that of the reparameterized `encoder`. Raises WeightsError over names or shapes."""
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
