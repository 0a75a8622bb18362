"""Which versions of what fastvlm stands on it was tested with."""

from __future__ import annotations

import importlib.metadata

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
}
"""From the first version on, and below the second. coremltools 9.0's torch frontend fails on numpy 2.4;
MLX has `device_info` for Metal since 0.30.4."""

TESTED_PYTHON: tuple[Release, Release] = ((3, 11), (3, 14))


def release(version: str) -> Release:
    """The leading numbers of a version: `2.13.0+cpu` -> (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def tested_range(name: str) -> str:
    """As pip writes it: `>=9.0,<9.1`."""
    first, beyond = TESTED_VERSIONS[name]
    return f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"


def is_tested(name: str, version: str) -> bool:
    first, beyond = TESTED_VERSIONS[name]
    return first <= release(version) < beyond


def require_installed(name: str) -> str:
    """The installed version of a package. Raises MachineError when it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        install = f'pip install "{name}{tested_range(name)}"'
        raise MachineError(f"{name} is needed for this and not installed: {install}") from None


def require_tested(*names: str) -> None:
    """Raises MachineError for the first that is missing or of another version: for work that is known to fail then."""
    for name in names:
        found = require_installed(name)
        if not is_tested(name, found):
            install = f'pip install "{name}{tested_range(name)}"'
            raise MachineError(f"{name} {found} does not work for this, only {tested_range(name)} does: {install}")
