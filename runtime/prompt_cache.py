"""The caches of earlier prompts: keys and values of their prefixes, and the features of their images."""

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

MAX_PREFIXES = 4
"""Text prefixes that are kept at once, next to the one that the chat template always writes."""

MAX_PREFIX_TOKENS = 512
"""The longest prefix worth keeping, in positions. It takes 13 MB for the 0.5B in float32."""

MAX_FEATURE_IMAGES = 4
"""Images whose features are kept at once. Pixels and features take 6 MB per image at 1024 px."""


class ImageItem:
    """An image of a prompt. Two are equal if they have the same pixels (3, S, S) uint8."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ImageItem) and np.array_equal(self.pixels, other.pixels))


PromptItem = int | ImageItem
"""One item of a prompt: a token id, or an image."""


def prompt_items(prompt: Prompt, images: Sequence[ImageItem]) -> tuple[PromptItem, ...]:
    """Returns the items of a prompt, with `images` at its image positions."""
    remaining = iter(images)
    return tuple(next(remaining) if n in prompt.places else token_id for n, token_id in enumerate(prompt.ids))


def position_count(items: Sequence[PromptItem], tokens_per_image: int) -> int:
    """Returns the positions that `items` take in the decoder."""
    return sum(tokens_per_image if isinstance(item, ImageItem) else 1 for item in items)


def segments(items: Sequence[PromptItem]) -> Iterator[list[int] | ImageItem]:
    """Yields runs of text ids, and images, in order."""
    run: list[int] = []
    for item in items:
        if not isinstance(item, ImageItem):
            run.append(item)
            continue
        if run:
            yield run
        run = []
        yield item
    if run:
        yield run


def shared_count(left: Sequence[PromptItem], right: Sequence[PromptItem]) -> int:
    """Returns the length of the common prefix, in items."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def text_prefix(items: Sequence[PromptItem]) -> list[int]:
    """Returns the ids before the first image, or an empty list for a prompt without images."""
    prefix: list[int] = []
    for item in items:
        if isinstance(item, ImageItem):
            return prefix
        prefix.append(item)
    return []


@dataclass
class CachedPrompt:
    """A KV cache and the items that it holds.

    The cache may lack the last ids that were handed out, because their decoding step has not run yet.
    """

    items: list[PromptItem] = field(default_factory=list)
    cache: list[KVCache] = field(default_factory=list)

    def take(self, items: Sequence[PromptItem], tokens_per_image: int) -> tuple[int, list[KVCache]]:
        """Returns how many of `items` are cached, and the cache, trimmed to them.

        This object is empty until `put` is called. The last item never counts as cached, because its logits are needed.
        """
        known, cache = self.items, self.cache
        self.clear()
        if not cache:
            return 0, []
        pending = max(0, position_count(known, tokens_per_image) - cache[0].offset)  # at the end, where all is text
        reused = min(shared_count(known[: len(known) - pending], items), len(items) - 1)
        for layer in cache:
            layer.trim(layer.offset - position_count(items[:reused], tokens_per_image))
        return reused, cache

    def put(self, items: Sequence[PromptItem], cache: list[KVCache]) -> None:
        """Replaces the content."""
        self.items, self.cache = list(items), cache

    @property
    def images(self) -> tuple[ImageItem, ...]:
        """The images among the items, in order."""
        return tuple(item for item in self.items if isinstance(item, ImageItem))

    def clear(self) -> None:
        """Drops the items and the cache."""
        self.items, self.cache = [], []


class PrefixCache:
    """KV caches of text prefixes: the pinned one, and the last few others."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._pinned: CachedPrompt | None = None
        self._others: deque[CachedPrompt] = deque(maxlen=max_prefixes)

    def add(self, ids: Sequence[PromptItem], cache: list[KVCache], pinned: bool = False) -> None:
        """Stores a cache that holds the text `ids` and nothing else."""
        entry = CachedPrompt(list(ids), cache)
        if pinned:
            self._pinned = entry
        else:
            self._others.append(entry)

    def longest(self, items: Sequence[PromptItem]) -> tuple[int, list[KVCache]]:
        """Returns how many of `items` are cached (never the last), and a copy of the cache that holds them."""
        best, reused = None, 0
        for entry in (*self._others, self._pinned) if self._pinned else tuple(self._others):
            known = min(shared_count(entry.items, items), len(items) - 1)
            if known > reused:
                best, reused = entry, known
        if best is None:
            return 0, []
        cache = [layer.fork() for layer in best.cache]
        for layer in cache:
            layer.trim(layer.offset - reused)  # a prefix is text, so an item is one position
        return reused, cache


def evaluate(cache: Sequence[KVCache]) -> None:
    """Computes the buffers of a cache now, because another thread could not."""
    mx.eval([layer.buffers for layer in cache])


class FeatureCache:
    """The `image_features` of the last few images, found by their pixels. The least recently used entry goes first.

    Pixels are compared in full, so no digest can collide. The comparison ends at the first byte that differs.

    Attributes:
        hits: number of cache hits so far.
    """

    def __init__(self, max_images: int = MAX_FEATURE_IMAGES) -> None:
        self._entries: deque[tuple[bytes, NDArray[np.float32]]] = deque(maxlen=max_images)
        self.hits = 0

    def get(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """Returns the features (1, N, C) of (3, S, S) `pixels`, or None. The array must not be written to."""
        content = pixels.tobytes()
        for index, (cached, features) in enumerate(self._entries):
            if cached == content:
                del self._entries[index]
                self._entries.append((cached, features))
                self.hits += 1
                return features
        return None

    def holds(self, pixels: NDArray[np.uint8]) -> bool:
        """Returns whether the features of `pixels` are cached, without counting a hit."""
        content = pixels.tobytes()
        return any(cached == content for cached, _ in list(self._entries))

    def put(self, pixels: NDArray[np.uint8], image_features: NDArray[np.float32]) -> None:
        """Stores the features of `pixels`."""
        self._entries.append((pixels.tobytes(), image_features))

    def clear(self) -> None:
        """Drops everything, so that the next answer shows its full time to first token."""
        self._entries.clear()
