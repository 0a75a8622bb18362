"""The actor of a Ray cluster: it loads a model once, and captions the images that it receives."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from .log import run_digest
from .sources import Item

if TYPE_CHECKING:
    from .pipeline import Captioner


@dataclass(frozen=True)
class WorkerSetup:
    """The model and the questions of an actor, see `RayCaptioner`."""

    folder: str
    prompts: tuple[str, ...]
    options: Mapping[str, Any]
    load: Mapping[str, Any]
    batch_size: int
    workers: int


class Worker:
    """The class of the actors. Its methods are called from the process that reads the images."""

    def __init__(self) -> None:
        self._captioner: Captioner | None = None

    def open(self, setup: WorkerSetup) -> tuple[str, str, str, tuple[str, ...]]:
        """Loads the model. Returns fastvlm's version, the digest of the folder, the host and the model's notes.

        Raises:
            FastVLMError: any error of `fastvlm.load`.
        """
        from ..fastvlm import load
        from .pipeline import Captioner

        model = load(setup.folder, **setup.load)
        self._captioner = Captioner(
            model, setup.prompts, setup.options, batch_size=setup.batch_size, workers=setup.workers
        )
        return __version__, run_digest(model.folder.path, (), {}), socket.gethostname(), tuple(model.notes)

    def caption(self, images: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """Returns the entries of images, given by their names in errors and their bytes.

        Raises:
            FastVLMError: an error that is not about one image.
        """
        assert self._captioner is not None
        items = [Item(name, lambda content=content: content) for name, content in images]  # type: ignore[misc]
        return [row.entry for row in self._captioner.rows(items)]
