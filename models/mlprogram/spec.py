"""coremltools' generated protobuf classes, without importing coremltools.

`import coremltools` takes 4-5 s and prints warnings; its generated modules alone take 30 ms. They import each other
relatively only, so they load under a package of our own whose search path is `coremltools/proto`. protobuf keys message
classes by descriptor: a later (or earlier) real import of coremltools yields the very same `Model` class.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import MachineError

_ALIAS = f"{__package__}._coremltools_proto"
_INSTALL = "install it with `pip install coremltools==9.0`"


def model_class() -> Any:
    """Return the protobuf message class `Model` (`CoreML.Specification.Model`).

    Raises:
        MachineError: coremltools is not installed, or its generated modules cannot be loaded.
    """
    return _generated("Model_pb2").Model


@cache
def data_types() -> dict[int, str]:
    """Return the names of the MIL data types by their number in the protobuf (10 -> "FLOAT16")."""
    return {number: name for name, number in _generated("MIL_pb2").DataType.items()}


def _generated(module: str) -> types.ModuleType:
    if _ALIAS not in sys.modules:
        alias = types.ModuleType(_ALIAS)
        alias.__path__ = [str(_proto_folder())]
        sys.modules[_ALIAS] = alias
    try:
        return importlib.import_module(f"{_ALIAS}.{module}")
    except (
        ImportError,
        TypeError,
    ) as error:  # protobuf raises TypeError when its runtime and the generated code disagree
        raise MachineError(f"coremltools' protobuf classes cannot be loaded ({error}): re{_INSTALL}") from error


def _proto_folder() -> Path:
    found = importlib.machinery.PathFinder.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        raise MachineError(f"coremltools is needed to read a .mlpackage and was not found: {_INSTALL}")
    return Path(next(iter(found.submodule_search_locations))) / "proto"
