"""The machine and the versions of a measurement, as far as the system reports them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..._version import __version__

VERSIONS = ("mlx", "torch", "coremltools", "numpy")
THREAD_VARIABLE = "OMP_NUM_THREADS"


def environment() -> dict[str, Any]:
    """Returns the `environment` of a report, as defined in `report.py`."""
    from ...models.blas import preload_blas

    mac = sys.platform == "darwin"
    return {
        "chip": _chip(mac),
        "cores": os.cpu_count(),
        "performance_cores": _number(_sysctl("hw.perflevel0.physicalcpu")) if mac else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "fastvlm": __version__,
        **{name: _version(name) for name in VERSIONS},
        "blas": "Accelerate" if mac else preload_blas().name,
        "threads": os.environ.get(THREAD_VARIABLE),
        "power": _mac_power() if mac else _governor(),
        "load_average": os.getloadavg()[0],
    }


def peak_memory_bytes() -> int | None:
    """Returns the largest resident size of this process so far, or None if the system does not report it.

    On Linux it is read from /proc, as the value of `getrusage` includes the parent's memory before the start.
    """
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if sys.platform == "darwin" else None


def mac_power(source: str, settings: str) -> str:
    """Returns e.g. `AC power, low power mode off`, from the output of `pmset -g batt` and `pmset -g`."""
    drawn = re.search(r"drawing from '([^']+)'", source)
    low = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", settings, re.MULTILINE)
    words = [drawn[1].replace("Power", "power")] if drawn else []
    if low:
        words.append({"0": "low power mode off", "1": "low power mode on", "2": "high power mode"}.get(low[1], low[0]))
    return ", ".join(words)


def _mac_power() -> str | None:
    return mac_power(_output("pmset", "-g", "batt"), _output("pmset", "-g")) or None


def _governor() -> str | None:
    """Returns Linux's frequency governor, or None on virtual machines."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def _chip(mac: bool) -> str | None:
    if mac:
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine() or None


def _sysctl(name: str) -> str:
    return _output("sysctl", "-n", name)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _output(*command: str) -> str:
    """Returns the output of a system tool, or an empty string if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
