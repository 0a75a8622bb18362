"""Core ML through coremltools: compute units, compiling, opening. The only code of the runtime that needs a Mac."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

from ..models.coreml_errors import coreml_reason
from ..models.errors import MachineError, PackageError, UsageError
from ..models.versions import import_coremltools
from .compiled_cache import Predict

COMPUTE_UNITS = ("CPU_AND_NE", "CPU_ONLY", "CPU_AND_GPU", "ALL")
"""The compute units that Core ML may run a package on. The first is the default."""

UNITS_VARIABLE = "FASTVLM_COMPUTE_UNITS"
"""The environment variable that names the default compute units, one of COMPUTE_UNITS."""

LIBRARY = "libcoremlpython"
"""coremltools' extension module, which calls Core ML. It predicts without coremltools' Python code."""

MODULE = f"coremltools.{LIBRARY}"
"""The name under which coremltools imports the module. Its types can be registered only once in a process."""


def check_mac() -> None:
    """Raises MachineError where Core ML cannot run."""
    if sys.platform != "darwin":
        raise MachineError("Core ML runs on macOS only. Leave backend out, or use backend='reference'.", "backend")


def default_compute_units() -> str:
    """Returns the units that FASTVLM_COMPUTE_UNITS names, or else the Neural Engine with the CPU. Raises UsageError."""
    named = os.environ.get(UNITS_VARIABLE)
    if not named:
        return COMPUTE_UNITS[0]
    if named not in COMPUTE_UNITS:
        raise UsageError(f"{UNITS_VARIABLE} must be one of {', '.join(COMPUTE_UNITS)}, got {named!r:.40}")
    return named


class Proxy(Protocol):
    """An open model, the class `_MLModelProxy` of the extension module."""

    def __init__(self, path: str, compute_units: str, function: str, hints: dict[str, str], asset: None) -> None: ...

    def predict(self, inputs: dict[str, Any], state: None) -> dict[str, Any]:
        """Runs the model. Raises RuntimeError."""

    @staticmethod
    def compileModel(path: str) -> str:  # noqa: N802 - its name
        """Compiles a package into a folder of the system's choice, and returns its path."""


class CoreMLTools:
    """A compiler that compiles packages and opens the result on given compute units.

    Importing coremltools takes seconds and 300 MB, and only conversion needs it, so the extension module is loaded
    alone. If that does not work, coremltools' own classes are used.

    Raises:
        MachineError: this machine is not a Mac, or coremltools is missing.
    """

    version: str

    def __init__(self, compute_units: str) -> None:
        check_mac()
        self.version = f"macOS {platform.mac_ver()[0]}"
        self._compute_units = compute_units
        self._proxy: type[Proxy] | None = extension_proxy()
        self._ct: Any = None if self._proxy else import_coremltools(conversion=False)

    def compile(self, package: Path, destination: Path) -> None:
        """Compiles a package. Raises RuntimeError."""
        if self._proxy:
            shutil.move(self._proxy.compileModel(str(package)), destination)
        else:
            self._ct.models.utils.compile_model(str(package), str(destination))

    def open(self, compiled: Path) -> Predict:
        """Opens a compiled package and returns the function that runs it, which raises PackageError."""
        predict = self._opened(compiled)

        def checked(inputs: dict[str, Any]) -> dict[str, Any]:
            try:
                return predict(inputs)
            except RuntimeError as reason:
                raise PackageError(f"Core ML cannot run the package: {coreml_reason(reason)}") from reason

        return checked

    def _opened(self, compiled: Path) -> Predict:
        if self._proxy:
            try:
                model = self._proxy(str(compiled), self._compute_units, "", {}, None)
            except TypeError:  # another version's constructor
                self._ct = import_coremltools(conversion=False)
            else:
                return lambda inputs: model.predict(inputs, None)
        units = self._ct.ComputeUnit[self._compute_units]
        predict: Predict = self._ct.models.CompiledMLModel(str(compiled), compute_units=units).predict
        return predict


def extension_proxy() -> type[Proxy] | None:
    """Returns `_MLModelProxy` of the extension module, loaded without coremltools, or None if that does not work."""
    package = importlib.util.find_spec("coremltools")
    folders = package.submodule_search_locations if package else None
    spec = PathFinder.find_spec(MODULE, list(folders or ()))
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError):
        return None
    sys.modules[MODULE] = module
    proxy = getattr(module, "_MLModelProxy", None)
    return proxy if hasattr(proxy, "compileModel") and hasattr(proxy, "predict") else None
