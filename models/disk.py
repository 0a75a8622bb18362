"""Room on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from .errors import OutputError


def check_space(destination: Path, needed_bytes: int) -> None:
    """Raises OutputError when the file system of `destination` has less than `needed_bytes` free."""
    existing = next(parent for parent in [destination, *destination.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"not enough space for {destination}: it needs about {needed_bytes / 1e6:,.0f} MB while it is written, "
            f"{free / 1e6:,.0f} MB are free; free some or choose another disk"
        )
