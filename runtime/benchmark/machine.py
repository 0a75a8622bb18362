"""The machine and the versions of a measurement, as far as the system reports them."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
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
    """Returns the largest memory of this process so far, or None if the system does not report it.

    On Linux it is the resident size, read from /proc, as the value of `getrusage` includes the parent's memory before
    the start. On a Mac it is the physical footprint, with what Metal has allocated, or else the resident size.
    """
    if sys.platform == "darwin":
        return peak_footprint_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return 1024 * int(match[1]) if match else None


PROC_PID_RUSAGE_V4 = 4
"""The flavor of `proc_pid_rusage` with `struct rusage_info_v4` of Apple's sys/resource.h."""

RUSAGE_UUID_BYTES = 16
RUSAGE_NUMBERS = 35
"""64-bit numbers behind the UUID."""

PEAK_FOOTPRINT = 28
"""The place of `ri_lifetime_max_phys_footprint` among them."""


def peak_footprint_bytes(call: Callable[[int, int, Any], int] | None = None) -> int | None:
    """Returns the largest physical footprint of this process on a Mac, or None if the system does not report it.

    `call` is `proc_pid_rusage(pid, flavor, buffer)` of the system's library, which returns 0 on success.
    """
    buffer = ctypes.create_string_buffer(RUSAGE_UUID_BYTES + 8 * RUSAGE_NUMBERS)
    try:
        call = call or ctypes.CDLL(None).proc_pid_rusage
        if call(os.getpid(), PROC_PID_RUSAGE_V4, buffer) != 0:
            return None
    except (AttributeError, OSError):
        return None
    return struct.unpack_from("<Q", buffer, RUSAGE_UUID_BYTES + 8 * PEAK_FOOTPRINT)[0] or None


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
