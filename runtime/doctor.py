"""What this machine can do for FastVLM, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "limited", "missing"]

TESTED_VERSIONS = {
    "coremltools": ((9, 0), (9, 1)),
    "numpy": ((1, 26), (2, 4)),
    "torch": ((2, 7), (2, 14)),
    "mlx": ((0, 30), (1, 0)),
    "tokenizers": ((0, 21), (1, 0)),
    "pillow": ((10, 1), (14, 0)),
}
"""From the first version on, and below the second. coremltools 9.0's torch frontend fails on numpy 2.4."""

COMFORTABLE_MEMORY_BYTES = 8 * 2**30
"""Exporting the 0.5B takes about 3 GB, on top of what else runs."""


@dataclass(frozen=True)
class Finding:
    subject: str
    state: State
    detail: str
    advice: str = ""
    """What to do about it; empty when nothing needs doing."""

    @property
    def mark(self) -> str:
        return {"ok": "✓", "limited": "!", "missing": "✗"}[self.state]

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything that decides what works here, the most basic first."""
    return [machine(), python(), *packages(), vision(), decoder(), *blas(), memory(), disk()]


def machine() -> Finding:
    mac = sys.platform == "darwin" and platform.machine() == "arm64"
    detail = f"{platform.system()} {platform.release()} on {platform.machine()}, {os.cpu_count()} cores"
    if mac:
        return Finding("machine", "ok", f"{detail}: Apple Silicon")
    return Finding("machine", "limited", detail, "no Neural Engine here: everything runs, but on the CPU")


def python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", "ok", detail)


def packages() -> Iterator[Finding]:
    for name, (first, beyond) in TESTED_VERSIONS.items():
        tested = f">={_dotted(first)},<{_dotted(beyond)}"
        install = f'pip install "{name}{tested}"'
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", install)
            continue
        if first <= _release(found) < beyond:
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "limited", f"{found}, tested with {tested}", install)


def vision() -> Finding:
    if sys.platform == "darwin":
        return Finding("vision", "ok", "Core ML on CPU_AND_NE; `--vision reference` for the reference executor")
    return Finding("vision", "limited", "reference executor on torch", "Core ML runs on a Mac only")


def decoder() -> Finding:
    try:
        from ..models._mlx import mx
    except ImportError as reason:
        extra = "[cpu]" if sys.platform == "linux" else ""
        return Finding("decoder", "missing", f"MLX cannot be imported: {reason}", f'pip install "mlx{extra}"')
    if mx.default_device() == mx.gpu:
        return Finding("decoder", "ok", f"MLX on {mx.default_device()}")
    return Finding("decoder", "limited", "MLX on the CPU, weights expanded to float32 while they fit in memory")


def blas() -> Iterator[Finding]:
    """Which BLAS MLX's matrix products run in; only Linux has a choice."""
    if sys.platform != "linux":
        return
    from ..models.blas import preload_blas

    found = preload_blas()
    detail = f"{found.name}{f' ({found.path})' if found.path else ''}: {found.reason}"
    if found.path:
        yield Finding("BLAS", "ok", detail)
    else:
        yield Finding(
            "BLAS", "limited", detail, "prefill will be some fifty times slower: apt install libopenblas0-pthread"
        )


def memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{total / 2**30:.0f} GiB"
    if total < COMFORTABLE_MEMORY_BYTES:
        return Finding("memory", "limited", detail, "exporting the 0.5B takes about 3 GB; larger ones may not fit")
    return Finding("memory", "ok", detail)


def disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:.0f} GB free in {Path.cwd()}"
    if free < 4e9:
        return Finding("disk", "limited", detail, "an export of the 0.5B takes up to 2 GB while it is written")
    return Finding("disk", "ok", detail)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` -> (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
