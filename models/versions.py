"""The tested versions of the dependencies, and the import of coremltools."""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from types import ModuleType

from .errors import MachineError

Release = tuple[int, ...]

TESTED_VERSIONS: dict[str, tuple[Release, Release]] = {
    "coremltools": ((9, 0), (9, 1)),
    "numpy": ((1, 26), (2, 4)),
    "torch": ((2, 7), (2, 14)),
    "mlx": ((0, 30, 4), (1, 0)),
    "tokenizers": ((0, 21), (1, 0)),
    "safetensors": ((0, 5), (1, 0)),
    "jinja2": ((3, 1), (4, 0)),
    "pillow": ((10, 1), (14, 0)),
    "pillow-heif": ((0, 21), (2, 0)),
}
"""The first tested version of each dependency, and the first that is not. The torch frontend of coremltools 9.0 fails
on numpy 2.4. MLX has `device_info` for Metal since 0.30.4."""

TESTED_PYTHON: tuple[Release, Release] = ((3, 11), (3, 14))


def release(version: str) -> Release:
    """Returns the leading numbers of a version, such as (2, 13, 0) for `2.13.0+cpu`."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def tested_range(name: str) -> str:
    """Returns the range in pip's form, such as `>=9.0,<9.1`."""
    first, beyond = TESTED_VERSIONS[name]
    return f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"


def is_tested(name: str, version: str) -> bool:
    """Returns True if `version` of `name` is in the tested range."""
    first, beyond = TESTED_VERSIONS[name]
    return first <= release(version) < beyond


def require_installed(name: str) -> str:
    """Returns the installed version of a package. Raises MachineError if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        install = f'pip install "{name}{tested_range(name)}"'
        raise MachineError(f"{name} is not installed. Run `{install}`.") from None


def require_tested(*names: str) -> None:
    """Raises MachineError for the first dependency that is missing or untested. For work that fails with others."""
    for name in names:
        found = require_installed(name)
        if not is_tested(name, found):
            install = f'pip install "{name}{tested_range(name)}"'
            raise MachineError(f"{name} {found} does not work for this: must be {tested_range(name)}. Run `{install}`.")


def import_coremltools(conversion: bool = True) -> ModuleType:
    """Returns the package, imported without its warnings about untested versions and Mac-only parts.

    The import takes seconds. Conversion fails with untested versions. Compiling and predicting accept newer ones.

    Raises:
        MachineError: coremltools is missing, or, for `conversion`, its version or numpy's is untested.
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
