"""How every module of ours gets coremltools: without its version warnings and failed-import lines."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType

from .versions import require_tested


def import_coremltools() -> ModuleType:
    """The package. Its import takes seconds, and warns of versions that work and of parts that only a Mac has.

    Raises:
        MachineError: it is not installed, or its version or numpy's is known not to convert.
    """
    require_tested("coremltools", "numpy")
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    return coremltools
