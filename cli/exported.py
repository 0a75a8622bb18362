"""A MODEL that may be an exported folder already; else it is exported for as long as a command runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..models.folder_layout import MANIFEST_NAME, PACKAGE_NAME
from .progress import StageProgress


@contextmanager
def exported(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """The folder itself, or a temporary export of the checkpoint. Raises FastVLMError."""
    folder = Path(model).expanduser()
    if (folder / MANIFEST_NAME).is_file() or (folder / PACKAGE_NAME).is_dir():
        yield folder
        return
    from ..models.references import open_checkpoint

    open_checkpoint(model)  # says what is wrong with a name before anything heavy is imported
    with temporary_export(model, on_stage) as exported_folder:
        yield exported_folder


@contextmanager
def temporary_export(model: str, on_stage: StageProgress) -> Iterator[Path]:
    """A temporary export of a checkpoint in int8. Raises FastVLMError."""
    from ..export.exporter import export

    with tempfile.TemporaryDirectory(prefix="fastvlm-") as scratch:
        # a shortfall is allowed: what is checked is how this machine runs the package
        yield export(model, Path(scratch) / "model", allow_shortfall=True, on_stage=on_stage).folder
