"""An exported Core AI asset compared with the checkpoint's encoder, and with its own stored weights in torch.

The saved asset runs in Apple's interpreter, in float16. It computes 1.5 GFLOP per second on two cores, so large images
are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..quant.calibration import NOISE, ImageSet
from ..quant.metrics import Agreement, WeightAudit, compare
from .coreai_asset import run_images
from .recipe import PackageInterface
from .verify_encoder import ALL, EncoderVerification, agreements

JUDGED_PIXELS = 4 * 512**2
"""The pixels that the interpreter runs in a verification: FastViTHD takes about three minutes."""

ARITHMETIC_FLOOR_DB = 42.0
"""The least SNR in dB of an asset, compared with torch in float32 with the same stored weights: that of fp16."""


@dataclass(frozen=True)
class AssetVerification(EncoderVerification):
    """The agreement of a Core AI asset with the checkpoint's encoder. It has no stages, weights and ranges."""

    images: int = 0
    """The number of images."""
    arithmetic: Agreement | None = None
    """The agreement with torch in float32 with the same stored weights. It shows Core AI's arithmetic alone."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries."""
        found = {
            "images": self.images,
            **self.output.as_dict(),
            "kinds": {kind: agreement.as_dict() for kind, agreement in self.kinds.items()},
        }
        return found if self.arithmetic is None else {**found, "stored_weights": self.arithmetic.as_dict()}


def judged_places(images: ImageSet) -> list[int]:
    """Returns the places of the images that the interpreter runs: photographs first, without noise, at least one."""
    order = sorted(
        (place for place, kind in enumerate(images.kinds) if kind != NOISE),
        key=lambda place: images.kinds[place] != "photographs",
    )
    return sorted(order[: max(1, JUDGED_PIXELS // images[0].shape[-1] ** 2)])


def verify_asset(
    asset: Path,
    images: ImageSet,
    expected: Sequence[np.ndarray],
    interface: PackageInterface,
    stored_features: Sequence[np.ndarray] = (),
) -> AssetVerification:
    """Runs a saved asset in Apple's interpreter and compares its output with `expected`, one for each of `images`.

    Args:
        stored_features: the output of torch with the same stored weights at `judged_places(images)`, if it is known.

    Raises:
        MachineError: Apple's packages are missing.
        CrashError: the interpreter's process ended early.
        VerificationError: a result is not finite, or has another shape than the checkpoint's.
    """
    places, name = judged_places(images), f"{asset.name}: {interface.output_name}"
    chosen = replace(
        images,
        pixels=tuple(images.pixels[place] for place in places),
        kinds=tuple(images.kinds[place] for place in places),
    )
    outputs = run_images(asset, chosen, interface)
    kinds = agreements(chosen, [expected[place] for place in places], outputs, name)
    arithmetic = None
    if stored_features:
        arithmetic = compare(np.concatenate(stored_features), np.concatenate(outputs), name)
    return AssetVerification(kinds.pop(ALL), {}, WeightAudit(), {}, kinds, images=len(places), arithmetic=arithmetic)
