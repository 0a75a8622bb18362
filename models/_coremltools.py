"""How every module of ours gets coremltools: without its version warnings and failed-import lines."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType

from .versions import require_installed, require_tested


def import_coremltools(conversion: bool = True) -> ModuleType:
    """The package. Its import takes seconds, and warns of versions that work and of parts that only a Mac has.

    Conversion is known to fail with other versions than the tested ones; compiling and predicting take newer ones too.

    Raises:
        MachineError: it is not installed; for `conversion`, its version or numpy's is not one of the tested ones.
    """
    if conversion:
        require_tested("coremltools", "numpy")
    else:
        require_installed("coremltools")
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    return coremltools
