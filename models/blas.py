"""The arithmetic of MLX's matrix products: a fast BLAS on Linux, and full float32 on GPUs.

MLX's Linux wheel has the reference BLAS, which is 50 to 100 times slower than the machine. The dynamic linker searches
the global scope before a wheel's own libraries. Another BLAS that is loaded there *before* `mlx.core` thus replaces it.
`libmlx.so` calls `cblas_sgemm`, which calls `sgemm_` through the same scope. A library that exports `sgemm_` is
enough (torch's does not export the other).
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
"""The environment variable with a library's path, or `none` for the BLAS of MLX's wheel."""

REQUIRED_SYMBOL = "sgemm_"

OMP_PAUSE_SOFT = 1
"""The value of OpenMP 5.0 (section 3.2.44) that releases resources and keeps settings."""

SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True)
class Blas:
    """The BLAS of MLX's matrix products, and the reason for the choice."""

    name: str
    """The name: `torch`, `openblas`, `custom` (from FASTVLM_BLAS), or `default` (MLX's own)."""
    path: str | None
    reason: str


@functools.cache
def preload_blas() -> Blas:
    """Loads the best available BLAS into the global scope, once per process and only on Linux.

    Never raises. A library that cannot be loaded is skipped, and `reason` has the cause.
    """
    if not sys.platform.startswith("linux"):
        return Blas("default", None, "MLX has a fast BLAS on this system (Accelerate, Metal)")
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
    """Ends the idle threads of torch's operations on this thread, before MLX computes again.

    GNU's OpenMP wakes its threads late if it keeps more of them than there are cores, and torch and MLX's products each
    keep a team. Decoding would take 1.6 times as long. Torch starts its team again on demand.
    """
    if sys.platform.startswith("linux"):
        pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
        if pause is not None:
            pause(OMP_PAUSE_SOFT)


def _candidates(wish: str) -> Iterator[tuple[str, str, str]]:
    """Yields (name, path, reason), the best first.

    Torch's library comes before a system BLAS. A later import of torch would otherwise bind to a foreign BLAS, with
    another threading library and other conventions for complex results.
    """
    if wish:
        yield "custom", wish, f"set in {ENVIRONMENT_VARIABLE}"
    torch = _torch_library()
    if torch is not None:
        yield "torch", str(torch), "part of torch"
    for soname in SYSTEM_LIBRARIES:
        yield "openblas", soname, "a library of the system"


def _torch_library() -> Path | None:
    """Returns the path of torch's BLAS without importing torch, which takes seconds."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # ValueError: a replaced module without a spec
        return None
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"
    return library if library.is_file() else None


def _load_globally(path: str) -> str | None:
    """Loads the library so that later libraries find its `sgemm_`. Returns the fault, or None."""
    try:
        library = ctypes.CDLL(path)  # not in the global scope yet, where a wrong library would do harm
        if not hasattr(library, REQUIRED_SYMBOL):
            return f"{REQUIRED_SYMBOL} is missing"
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        return str(reason).splitlines()[0]
    return None


TF32_VARIABLE = "MLX_ENABLE_TF32"
"""MLX reads it at its first matrix product. By default GPUs that can (M5 and later) round the factors to 10 bits."""


def disable_tf32() -> None:
    """Makes float32 products exact to float32 in this process, unless the user has set MLX's variable.

    Takes effect only before the first matrix product in MLX.
    """
    os.environ.setdefault(TF32_VARIABLE, "0")
