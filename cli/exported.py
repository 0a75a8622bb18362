"""MODEL as an exported folder. A checkpoint is exported for the time that a command runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from .progress import StageProgress


@contextmanager
def exported(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """Yields the folder itself, or a temporary export of the checkpoint. Raises FastVLMError."""
    folder = Path(model).expanduser()
    if (folder / MANIFEST_NAME).is_file() or (folder / PACKAGE_NAME).is_dir():
        yield folder
        return
    from ..models.references import open_checkpoint

    open_checkpoint(model)  # raises for a wrong name before anything heavy is imported
    with temporary_export(model, on_stage) as exported_folder:
        yield exported_folder


@contextmanager
def temporary_export(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """Yields a temporary int8 export of a checkpoint. Raises FastVLMError."""
    from ..export.exporter import export

    with tempfile.TemporaryDirectory(prefix="fastvlm-") as scratch:
        # A shortfall is allowed, because the command checks how this machine runs the package.
        yield export(model, Path(scratch) / "model", allow_shortfall=True, on_stage=on_stage).folder
