"""From a checkpoint to a model folder: Core ML package, MLX weights, tokenizer, manifest.

The package shares its name with the public function `fastvlm.export(...)`, so it can be called as that.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import Export


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Export:
        """See `fastvlm.export.exporter.export`."""
        from .exporter import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
