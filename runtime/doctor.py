"""A check of this machine: hardware, packages, memory and disk space, with advice for each limit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ..models.errors import MachineError
from ..models.versions import TESTED_PYTHON, TESTED_VERSIONS, is_tested, release, tested_range

State = Literal["ok", "limited", "missing"]
"""`limited` works with a restriction, `missing` keeps a command from working."""

HUB_SECONDS = 2.0
"""The longest wait for a connection to the hub, in seconds."""

COMFORTABLE_MEMORY_BYTES = 8 * 2**30
"""The memory below which an export may not fit, in bytes. The 0.5B takes about 3 GB, in addition to other programs."""

ENGINE_DEVICE = "MLNeuralEngineComputeDevice"
"""The class of the Neural Engine in coremltools."""

DEVICES_COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import json\n"
    "from coremltools.models.compute_device import MLComputeDevice\n"
    "names = [type(device).__name__ for device in MLComputeDevice.get_all_compute_devices()]\n"
    "print(json.dumps(names))",
)
"""Prints the class names of Core ML's devices. Runs in its own process, because importing coremltools is slow."""

DEVICES_SECONDS = 60.0
"""The limit of that process, in seconds. The import takes a few, the rest almost none."""


@dataclass(frozen=True)
class Finding:
    """The state of one part of this machine."""

    subject: str
    state: State
    detail: str
    advice: str = ""
    """The remedy, empty if none is needed."""

    @property
    def mark(self) -> str:
        """The character in front of the line."""
        return {"ok": "✓", "limited": "!", "missing": "✗"}[self.state]

    def as_dict(self) -> dict[str, str]:
        """Returns a dictionary for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Checks everything that decides which commands work here, the most basic first."""
    return [machine(), python(), *packages(), vision(), decoder(), *blas(), memory(), disk(), temporary_files(), hub()]


def machine() -> Finding:
    """Checks for Apple Silicon."""
    mac = sys.platform == "darwin" and platform.machine() == "arm64"
    detail = f"{platform.system()} {platform.release()} on {platform.machine()}, {os.cpu_count()} cores"
    if mac:
        return Finding("machine", "ok", f"{detail}: Apple Silicon")
    return Finding("machine", "limited", detail, "no Neural Engine here: everything runs, but on the CPU")


def python(version: str = platform.python_version()) -> Finding:
    """Checks that the version of Python is a tested one."""
    detail = f"{version} at {sys.executable}"
    first, beyond = TESTED_PYTHON
    if first <= release(version) < beyond:
        return Finding("python", "ok", detail)
    return Finding("python", "limited", detail, "tested with 3.11 to 3.13: make an environment with one of these")


def packages() -> Iterator[Finding]:
    """Checks that each dependency is installed in a tested version."""
    for name in TESTED_VERSIONS:
        install = f'pip install "{name}{tested_range(name)}"'
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", install)
            continue
        if is_tested(name, found):
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "limited", f"{found}, tested with {tested_range(name)}", install)


def vision(devices: Callable[[], list[str]] | None = None) -> Finding:
    """Checks the vision encoder's backend, and on a Mac Core ML's Neural Engine. `devices` lists Core ML's devices."""
    if sys.platform != "darwin":
        return Finding("vision", "limited", "reference executor on torch", "Core ML runs on a Mac only")
    try:
        found = (devices or core_ml_devices)()
    except MachineError as reason:
        deep = "find out which compute units work: fastvlm doctor --deep"
        return Finding("vision", "limited", f"Core ML on unknown devices: {reason}", deep)
    if ENGINE_DEVICE not in found:
        listed = ", ".join(name.removeprefix("ML").removesuffix("ComputeDevice") for name in found)
        return Finding(
            "vision",
            "limited",
            f"Core ML without a Neural Engine (it has {listed or 'nothing'})",
            "a load for the engine can hang in a virtual machine: set FASTVLM_COMPUTE_UNITS=CPU_ONLY",
        )
    return Finding("vision", "ok", "Core ML on CPU_AND_NE; `fastvlm doctor --deep` tries every compute unit")


def core_ml_devices(command: Sequence[str] = DEVICES_COMMAND) -> list[str]:
    """Returns the class names of Core ML's devices, found in a separate process. Raises MachineError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DEVICES_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise MachineError(f"they cannot be listed ({type(reason).__name__})") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MachineError(f"they cannot be listed ({lines[-1]:.200})") from None
    return [str(name) for name in found]


def decoder() -> Finding:
    """Checks MLX and its device."""
    try:
        from ..models._mlx import mx
    except ImportError as reason:
        extra = "[cpu]" if sys.platform == "linux" else ""
        return Finding("decoder", "missing", f"MLX cannot be imported: {reason}", f'pip install "mlx{extra}"')
    if mx.default_device() == mx.gpu:
        return Finding("decoder", "ok", f"MLX on {mx.default_device()}")
    detail = "MLX on the CPU, weights expanded to float32 while they fit in memory"
    if sys.platform == "darwin":
        advice = "MLX finds no Metal: use Apple Silicon with macOS 14 or newer, outside a virtual machine"
        return Finding("decoder", "limited", detail, advice)
    return Finding("decoder", "limited", detail, "no GPU that MLX can use: Metal on a Mac, or CUDA")


def blas() -> Iterator[Finding]:
    """Checks the BLAS of MLX's matrix products, which only Linux has a choice of."""
    if sys.platform != "linux":
        return
    from ..models.blas import preload_blas

    found = preload_blas()
    if found.path:
        yield Finding("BLAS", "ok", f"MLX's matrix products run in {found.path} ({found.reason})")
    else:
        detail = f"MLX's matrix products run in its own, which is slow ({found.reason})"
        yield Finding(
            "BLAS", "limited", detail, "prefill will be some fifty times slower: apt install libopenblas0-pthread"
        )


def memory() -> Finding:
    """Checks the size of the memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{total / 2**30:.0f} GiB"
    if total < COMFORTABLE_MEMORY_BYTES:
        return Finding("memory", "limited", detail, "exporting the 0.5B takes about 3 GB, and larger ones may not fit")
    return Finding("memory", "ok", detail)


def disk(folder: Path | None = None) -> Finding:
    """Checks that `folder`, by default the current one, can be written and has free space."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", "limited", f"{folder} cannot be written", "change to a folder that you own, or use --out"
        )
    if free < 4e9:
        return Finding("disk", "limited", detail, "an export of the 0.5B takes up to 2 GB while it is written")
    return Finding("disk", "ok", detail)


def temporary_files() -> Finding:
    """Checks the folder of temporary files, where coremltools first writes a package."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as reason:
        return Finding("temporary files", "missing", str(reason), "set TMPDIR to a folder with 1 GB free")
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB free in {folder}"
    if free < 1e9:
        return Finding("temporary files", "limited", detail, "set TMPDIR to a folder with 1 GB free")
    return Finding("temporary files", "ok", detail)


def hub(endpoint: str | None = None) -> Finding:
    """Checks that the hub can be reached. Nothing is sent."""
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    advice = "only downloads need it: everything else works without"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "limited", "HF_HUB_OFFLINE is set", advice)
    try:
        address = urlsplit(endpoint)
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS).close()
    except (OSError, ValueError) as reason:
        return Finding("hub", "limited", f"{endpoint} cannot be reached: {reason}", advice)
    return Finding("hub", "ok", f"{endpoint} answers")
