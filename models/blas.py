"""A fast BLAS for MLX on Linux.

MLX's Linux wheel brings the reference BLAS, which is 50 to 100 times slower than the machine. The dynamic linker looks
in the global scope before a wheel's own libraries, so another BLAS that is loaded there *before* `mlx.core` takes its
place: `libmlx.so` calls `cblas_sgemm`, and the wheel's `cblas_sgemm` calls `sgemm_` through that same scope, so a
library that exports `sgemm_` is enough (torch's does not export the other).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT_VARIABLE = "FASTVLM_BLAS"
"""A library's path, or `none` to leave MLX with the BLAS of its wheel."""

REQUIRED_SYMBOL = "sgemm_"

OMP_PAUSE_SOFT = 1
"""Of OpenMP 5.0, section 3.2.44: give back what can be had again, keep settings."""

SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True)
class Blas:
    """The BLAS that MLX's matrix products run on, and why it is that one."""

    name: str
    """`torch`, `openblas`, `custom` (named by FASTVLM_BLAS), or `default` (MLX's own)."""
    path: str | None
    reason: str


@functools.cache
def preload_blas() -> Blas:
    """Loads the best BLAS at hand into the global scope; once per process, and only on Linux.

    Never raises: a library that cannot be loaded is passed over, and `reason` says why.
    """
    if not sys.platform.startswith("linux"):
        return Blas("default", None, "MLX brings a fast BLAS here (Accelerate, Metal)")
    if "mlx.core" in sys.modules:
        return Blas("default", None, "mlx.core was imported before fastvlm, too early for another BLAS")
    wish = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wish.lower() == "none":
        return Blas("default", None, f"{ENVIRONMENT_VARIABLE}=none")
    passed_over: list[str] = []
    for name, path, reason in _candidates(wish):
        fault = _load_globally(path)
        if fault is None:
            return Blas(name, path, "; ".join([reason, *passed_over]))
        passed_over.append(f"not {path}: {fault}")
    return Blas("default", None, "; ".join(["no faster BLAS was found", *passed_over]))


def release_torch_threads() -> None:
    """Ends the threads that torch's operations on this thread have left waiting, before MLX computes again.

    GNU's OpenMP wakes its threads late once it keeps more of them than there are cores, and torch and MLX's products
    each keep a team: decoding would take 1.6 times as long. Torch starts its team again when it next needs it.
    """
    if sys.platform.startswith("linux"):
        pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
        if pause is not None:
            pause(OMP_PAUSE_SOFT)


def _candidates(wish: str) -> Iterator[tuple[str, str, str]]:
    """(name, path, reason), best first.

    Torch's own comes before any other: torch would otherwise be bound to a foreign one when it is imported later, with
    another threading library and other conventions for complex results. A system BLAS serves where torch cannot load.
    """
    if wish:
        yield "custom", wish, f"named by {ENVIRONMENT_VARIABLE}"
    torch = _torch_library()
    if torch is not None:
        yield "torch", str(torch), "torch brings it"
    for soname in SYSTEM_LIBRARIES:
        yield "openblas", soname, "the system brings it"


def _torch_library() -> Path | None:
    """Where torch keeps its BLAS, found without importing torch (which takes seconds)."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # ValueError: a stand-in without a spec
        return None
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"
    return library if library.is_file() else None


def _load_globally(path: str) -> str | None:
    """None when the library now serves `sgemm_` to whoever loads later, else what is wrong with it."""
    try:
        library = ctypes.CDLL(path)  # not yet in the global scope: a wrong library must not get there
        if not hasattr(library, REQUIRED_SYMBOL):
            return f"it has no {REQUIRED_SYMBOL}"
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        return str(reason).splitlines()[0]
    return None
