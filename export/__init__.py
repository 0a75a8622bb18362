"""Exports a checkpoint to a model folder: Core ML package, MLX weights, tokenizer, manifest.

The package can be called: `fastvlm.export("tiny", "model")` calls `fastvlm.export.exporter.export`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import Export


class _CallablePackage(ModuleType):
    # A package that is also the function of its name, with that function's signature and documentation.

    def __call__(self, *args: Any, **options: Any) -> Export:
        """Calls `fastvlm.export.exporter.export`."""
        from .exporter import export

        return export(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        from .exporter import export

        return inspect.signature(export)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        from .exporter import export

        summary, details = (inspect.getdoc(export) or "").split("\n", 1)
        arguments = "\n".join(f"    {_argument(one)}," for one in self.__signature__.parameters.values())
        return f"{summary}\n\nexport(\n{arguments}\n) -> Export\n{details}"


def _argument(parameter: inspect.Parameter) -> str:
    """Returns an argument as it is written in source code."""
    default = parameter.default
    shown = default.__name__ if callable(default) else repr(default)
    return f"{parameter.name}: {parameter.annotation} = {shown}"


sys.modules[__name__].__class__ = _CallablePackage
