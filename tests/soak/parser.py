"""What a parser of the soak is: whole files, a way to damage each, and what reads them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]
Files = Mapping[str, tuple[bytes, Damage]]


@dataclass(frozen=True)
class Parser:
    """`read(folder)` reads what stands in a folder in which `files` are damaged, one of them at a time."""

    name: str
    files: Files
    read: Callable[[Path], Any]
    fixed: Path | None = None
    """A folder whose files lie beside the damaged one."""
    share: float = 1.0
    """Of the cases that a parser gets on average."""
    left_out: tuple[str, ...] = ()
    """Of the fixed files."""

    def prepare(self, folder: Path) -> None:
        """The whole files, in a new `folder`."""
        folder.mkdir(parents=True)
        if self.fixed is not None:
            shutil.copytree(self.fixed, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*self.left_out))
        for name, (content, _) in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def damage(self, folder: Path, seed: int) -> str:
        """Damages one file and returns its name; `restore` mends it."""
        rng = random.Random(f"{self.name} {seed}")
        name = rng.choice(sorted(self.files))
        content, damage = self.files[name]
        (folder / name).write_bytes(damage(content, rng))
        return name

    def restore(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(self.files[name][0])


def damaged(damage: Damage, root: Path, *names: str) -> dict[str, tuple[bytes, Damage]]:
    """Files of a folder that are to be damaged in one way."""
    return {name: ((root / name).read_bytes(), damage) for name in names}
