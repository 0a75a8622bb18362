"""The choice of the backend that runs a model folder's vision encoder."""

from __future__ import annotations

import sys
from pathlib import Path

from ..models.errors import UsageError
from ..models.folder_layout import has_mlx_encoder
from .coreml import COMPUTE_UNITS, check_mac, default_compute_units
from .encoder_process import EncoderProcess
from .encoders import MLXEncoder, OnWait, ReferenceEncoder, Shapes, VisionEncoder

BACKENDS = ("coreml", "reference", "mlx")
"""The backends of the vision encoder: Core ML, the reference executor, and MLX for folders without a package."""


def open_encoder(
    package: Path,
    backend: str | None,
    shapes: Shapes,
    compute_units: str | None = None,
    encoder_process: bool = False,
    on_wait: OnWait | None = None,
) -> VisionEncoder:
    """Opens the vision encoder on a backend. None takes Core ML on a Mac and the reference executor elsewhere.

    Without a package, the folder has the encoder in MLX, and `mlx` is the only backend. `compute_units` is one of
    COMPUTE_UNITS, for Core ML only. None takes FASTVLM_COMPUTE_UNITS, or else the first. Core ML runs in a process of
    its own, which loads while this one does other work. With `encoder_process` the reference executor does too.

    Raises:
        UsageError: the backend does not exist or does not fit the folder, or the compute units do not fit the backend.
        MachineError: this machine does not have the backend.
        PackageError: the package cannot be read or compiled.
    """
    in_mlx = not package.is_dir() and has_mlx_encoder(package.parent)
    if backend in BACKENDS and in_mlx != (backend == "mlx"):
        found = "has its encoder in MLX" if in_mlx else "has its encoder in a package"
        advice = "Use backend='mlx'" if in_mlx else "Use another backend"
        raise UsageError(
            f"backend={backend!r} does not fit {package.parent}, which {found}. {advice}, or leave it out.", "backend"
        )
    if backend is None:
        backend = "mlx" if in_mlx else "coreml" if sys.platform == "darwin" else "reference"
    check_compute_units(backend, compute_units)
    if backend == "mlx":
        if encoder_process:
            raise UsageError(
                f"encoder_process=True runs packages, and {package.parent} has none. Leave encoder_process out.",
                "encoder_process",
            )
        return MLXEncoder(package.parent, shapes)
    if backend == "coreml":
        check_mac()
        units = compute_units or default_compute_units()
        return EncoderProcess(package, shapes, compute_units=units, on_wait=on_wait)
    if backend == "reference":
        if not encoder_process:
            return ReferenceEncoder(package, shapes)
        return EncoderProcess(package, shapes, backend="reference", on_wait=on_wait)
    raise UsageError(f"backend must be 'coreml', 'reference' or 'mlx', got {backend!r:.40}", "backend")


def encoder_notes(encoder: VisionEncoder) -> tuple[str, ...]:
    """Returns notes for the user on how the backend runs the package. Waits until it is loaded."""
    return encoder.notes if isinstance(encoder, EncoderProcess) else ()


def check_compute_units(backend: str, compute_units: str | None) -> None:
    """Raises UsageError unless the compute units are None, or are Core ML's and the backend is Core ML."""
    if compute_units is None:
        return
    if compute_units not in COMPUTE_UNITS:
        raise UsageError(
            f"compute_units must be one of {', '.join(COMPUTE_UNITS)}, got {compute_units!r:.40}", "compute_units"
        )
    if backend != "coreml":
        raise UsageError(
            f"compute_units needs backend='coreml', got backend={backend!r:.40}. Leave compute_units out.",
            "compute_units",
            "backend",
        )
