"""FastVLM on Apple Silicon: export for the Neural Engine, answer with MLX, measure the time to first token.

    >>> import fastvlm
    >>> fastvlm.export("tiny", "model", quant="int8")
    >>> vlm = fastvlm.load("model")
    >>> vlm.generate("photo.jpg", "Describe the image.").text

Everything is imported when it is first used: `import fastvlm` itself costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .export.bundle.write import bundle as bundle
    from .export.exporter import export as export
    from .export.verify import verify as verify
    from .models import mlprogram as mlprogram
    from .models.errors import FastVLMError as FastVLMError
    from .runtime.benchmark.run import benchmark as benchmark
    from .runtime.bulk import ray_data as ray  # noqa: F401
    from .runtime.conversation import Conversation as Conversation
    from .runtime.evaluation.run import evaluate as evaluate
    from .runtime.fastvlm import FastVLM as FastVLM
    from .runtime.fastvlm import load as load
    from .runtime.generate import Generation as Generation
    from .runtime.logprobs import TokenLogprob as TokenLogprob

PUBLIC = {
    "Conversation": ".runtime.conversation",
    "FastVLM": ".runtime.fastvlm",
    "FastVLMError": ".models.errors",
    "Generation": ".runtime.generate",
    "TokenLogprob": ".runtime.logprobs",
    "benchmark": ".runtime.benchmark.run",
    "bundle": ".export.bundle.write",
    "evaluate": ".runtime.evaluation.run",
    "export": ".export",
    "load": ".runtime.fastvlm",
    "mlprogram": ".models.mlprogram",
    "ray": ".runtime.bulk.ray_data",
    "verify": ".export.verify",
}
"""Public name -> the module that holds it. `fastvlm.export` is a package that can be called."""

MODULES = frozenset(("export", "mlprogram", "ray"))
"""The public names that are modules themselves."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fastvlm' has no attribute {name!r}")
    module = import_module(PUBLIC[name], __name__)
    return module if name in MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
