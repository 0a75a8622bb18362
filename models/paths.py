"""Paths made of names that somebody else wrote."""

from __future__ import annotations

from pathlib import Path


def is_file(path: Path) -> bool:
    """Whether a regular file is there; it is not under a name that no file can have, as one of 100,000 characters."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # not all versions of Python pass over these
        return False
