"""What has been read already: the keys and values of a prompt's beginning, found again cell by cell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..models._mlx import mx
from ..models.kv_cache import KVCache
from .prompt import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIXES = 4
"""Remembered at once, beside the one that the chat template always writes."""

MAX_PREFIX = 512
"""Positions of a prefix that is worth remembering: 13 MB for the 0.5B in float32."""


class Picture:
    """An image in its place among the tokens: equal to another with the same pixels (3, S, S) uint8."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Picture) and np.array_equal(self.pixels, other.pixels))


Cell = int | Picture
"""What stands in a prompt: a token's id, or an image."""


def cells_of(prompt: Prompt, pictures: Sequence[Picture]) -> tuple[Cell, ...]:
    """The prompt with its images in their places."""
    images = iter(pictures)
    return tuple(next(images) if n in prompt.places else token_id for n, token_id in enumerate(prompt.ids))


def position_count(cells: Sequence[Cell], tokens_per_image: int) -> int:
    """Positions that `cells` take in the decoder."""
    return sum(tokens_per_image if isinstance(cell, Picture) else 1 for cell in cells)


def segments(cells: Sequence[Cell]) -> Iterator[list[int] | Picture]:
    """Runs of text ids, and images, in order."""
    run: list[int] = []
    for cell in cells:
        if not isinstance(cell, Picture):
            run.append(cell)
            continue
        if run:
            yield run
        run = []
        yield cell
    if run:
        yield run


def shared_count(left: Sequence[Cell], right: Sequence[Cell]) -> int:
    """How many cells both begin with."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def lead_of(cells: Sequence[Cell]) -> list[int]:
    """The ids of the text in front of the first image; none where no image stands."""
    lead: list[int] = []
    for cell in cells:
        if isinstance(cell, Picture):
            return lead
        lead.append(cell)
    return []


@dataclass
class Memory:
    """The cells that a cache holds; of the last of them, those that were only handed out may not be in it yet."""

    cells: list[Cell] = field(default_factory=list)
    cache: list[KVCache] = field(default_factory=list)

    def take(self, cells: Sequence[Cell], tokens_per_image: int) -> tuple[int, list[KVCache]]:
        """How many of `cells` the cache holds, and the cache, cut to them; the memory is empty until it is put back.

        The last cell is never counted: it has to be read for the logits that follow it.
        """
        known, cache = self.cells, self.cache
        self.clear()
        if not cache:
            return 0, []
        unread = max(0, position_count(known, tokens_per_image) - cache[0].offset)  # at the end, where all is text
        held = min(shared_count(known[: len(known) - unread], cells), len(cells) - 1)
        for layer in cache:
            layer.trim(layer.offset - position_count(cells[:held], tokens_per_image))
        return held, cache

    def put(self, cells: Sequence[Cell], cache: list[KVCache]) -> None:
        self.cells, self.cache = list(cells), cache

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(cell for cell in self.cells if isinstance(cell, Picture))

    def clear(self) -> None:
        self.cells, self.cache = [], []


class Prefixes:
    """The beginnings of prompts that were read before: the one that is pinned, and the last few others."""

    def __init__(self, count: int = PREFIXES) -> None:
        self._pinned: Memory | None = None
        self._others: deque[Memory] = deque(maxlen=count)

    def add(self, cells: Sequence[Cell], cache: list[KVCache], pinned: bool = False) -> None:
        """Remembers text `cells` and a cache that holds them and nothing else."""
        entry = Memory(list(cells), cache)
        if pinned:
            self._pinned = entry
        else:
            self._others.append(entry)

    def longest(self, cells: Sequence[Cell]) -> tuple[int, list[KVCache]]:
        """How many of `cells` are known (never the last), and a cache of its own that holds them."""
        best, held = None, 0
        for entry in (*self._others, self._pinned) if self._pinned else tuple(self._others):
            known = min(shared_count(entry.cells, cells), len(cells) - 1)
            if known > held:
                best, held = entry, known
        if best is None:
            return 0, []
        cache = [layer.fork() for layer in best.cache]
        for layer in cache:
            layer.trim(layer.offset - held)  # text alone: a cell is a position
        return held, cache


def evaluated(cache: Sequence[KVCache]) -> None:
    """Computes what the cache holds: another thread could not."""
    mx.eval([layer.buffers for layer in cache])
