"""A parser of the soak: undamaged files, a way to damage each, and their reader."""

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
    """A function `read(folder)` with `files` that are damaged one at a time."""

    name: str
    files: Files
    read: Callable[[Path], Any]
    fixed: Path | None = None
    """A folder with the files that stay undamaged."""
    share: float = 1.0
    """The number of cases as a share of the average."""
    left_out: tuple[str, ...] = ()
    """The names of files in `fixed` that are not copied."""

    def prepare(self, folder: Path) -> None:
        """Writes the undamaged files into a new `folder`."""
        folder.mkdir(parents=True)
        if self.fixed is not None:
            shutil.copytree(self.fixed, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*self.left_out))
        for name, (content, _) in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def damage(self, folder: Path, seed: int) -> str:
        """Damages one file and returns its name."""
        rng = random.Random(f"{self.name} {seed}")
        name = rng.choice(sorted(self.files))
        content, damage = self.files[name]
        (folder / name).write_bytes(damage(content, rng))
        return name

    def restore(self, folder: Path, name: str) -> None:
        """Writes the undamaged file again."""
        (folder / name).write_bytes(self.files[name][0])


def damaged(damage: Damage, root: Path, *names: str) -> dict[str, tuple[bytes, Damage]]:
    """Returns files of a folder with one way to damage them."""
    return {name: ((root / name).read_bytes(), damage) for name in names}
