"""The caches of earlier prompts: keys and values of their prefixes, and the features of their images."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..models._mlx import mx
from ..models.errors import UsageError
from ..models.kv_cache import KVCache
from ..models.language import available_memory_bytes
from .prompt import Prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PREFIX_TOKENS = 512
"""The longest text prefix that is computed separately, in positions. It takes 13 MB for the 0.5B in float32."""

MEMORY_SHARE = 1 / 16
"""The share of available memory that the caches of earlier prompts may take by default."""

MIN_CACHE_BYTES, MAX_CACHE_BYTES = 64 * 2**20, 2**30
"""The limits of that default, in bytes. A prompt with one image at 1024 px takes 7 MB for the 0.5B in float32."""

FEATURE_SHARE = 0.25
"""The share of the caches' bytes that is for image features, which take 3 MB per image at 1024 px."""


class ImageItem:
    """An image of a prompt. Two are equal if they have the same pixels (3, S, S) uint8."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    @functools.cached_property
    def digest(self) -> bytes:
        """The SHA-256 of the pixels, which identifies the image in caches."""
        return hashlib.sha256(self.pixels.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ImageItem) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)


PromptItem = int | ImageItem
"""One item of a prompt: a token id, or an image."""


def prompt_items(prompt: Prompt, images: Sequence[ImageItem]) -> tuple[PromptItem, ...]:
    """Returns the items of a prompt, with `images` at its image positions."""
    remaining = iter(images)
    return tuple(next(remaining) if n in prompt.places else token_id for n, token_id in enumerate(prompt.ids))


def position_count(items: Sequence[PromptItem], tokens_per_image: int) -> int:
    """Returns the positions that `items` take in the decoder."""
    return sum(tokens_per_image if isinstance(item, ImageItem) else 1 for item in items)


def image_count(items: Sequence[PromptItem]) -> int:
    """Returns the number of images among `items`."""
    return sum(isinstance(item, ImageItem) for item in items)


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


def shared_count(left: Sequence[object], right: Sequence[object]) -> int:
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
        known, cache = self.computed(tokens_per_image), self.cache
        self.clear()
        if not cache:
            return 0, []
        reused = min(shared_count(known, items), len(items) - 1)
        for layer in cache:
            layer.trim(layer.offset - position_count(items[:reused], tokens_per_image))
        return reused, cache

    def computed(self, tokens_per_image: int) -> list[PromptItem]:
        """Returns the items that the cache holds."""
        if not self.cache:
            return []
        pending = max(0, position_count(self.items, tokens_per_image) - self.cache[0].offset)  # at the end, all is text
        return self.items[: len(self.items) - pending]

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


def default_cache_bytes() -> int:
    """Returns the bytes that the caches of earlier prompts may take on this machine."""
    return int(min(max(MEMORY_SHARE * available_memory_bytes(), MIN_CACHE_BYTES), MAX_CACHE_BYTES))


def check_cache_bytes(cache_bytes: int | None) -> None:
    """Raises UsageError unless `cache_bytes` is None or a whole number from 0."""
    valid = cache_bytes is None or (isinstance(cache_bytes, int) and not isinstance(cache_bytes, bool))
    if not valid or (cache_bytes or 0) < 0:
        raise UsageError(f"cache_bytes must be a whole number from 0 (got {cache_bytes!r:.40}).", "cache_bytes")


Key = tuple[int | bytes, ...]
"""The items of a prompt, with the digests of its images."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A KV cache of a prefix, which is never changed. Users take forks of it."""

    key: Key
    cache: list[KVCache]

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        return sum(layer.nbytes for layer in self.cache)


class PrefixCache:
    """KV caches of earlier prompts and answers: text, and images by their content. Several threads may use it.

    The least recently used entry goes first. A pinned one, the prefix that the chat template always writes, stays.

    Attributes:
        max_bytes: the most bytes of keys and values, without the pinned entry. 0 keeps no others.
    """

    def __init__(self, max_bytes: int, tokens_per_image: int) -> None:
        self.max_bytes = max_bytes
        self._tokens_per_image = tokens_per_image
        self._pinned: CachedPrefix | None = None
        self._entries: list[CachedPrefix] = []
        """The least recently used entry is the first."""
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values, without the pinned entry."""
        with self._lock:
            return self._nbytes()

    def add(self, items: Sequence[PromptItem], cache: list[KVCache], pinned: bool = False) -> None:
        """Stores a cache that holds `items` and nothing else. Nobody may change it from here on.

        An entry that the new one begins with is dropped.
        """
        new = CachedPrefix(key_of(items), cache)
        with self._lock:
            if pinned:
                self._pinned = new
                return
            if new.nbytes > self.max_bytes:
                return
            longer = next((one for one in self._entries if one.key[: len(new.key)] == new.key), None)
            kept = [one for one in self._entries if one is not longer and new.key[: len(one.key)] != one.key]
            self._entries = [*kept, longer or new]
            while self._nbytes() > self.max_bytes:
                self._entries.pop(0)

    def count(self, items: Sequence[PromptItem]) -> int:
        """Returns how many of `items` are cached, never the last, because its logits are needed."""
        with self._lock:
            return self._find(key_of(items))[0]

    def longest(self, items: Sequence[PromptItem]) -> tuple[int, list[KVCache]]:
        """Returns how many of `items` are cached (see `count`), and a fork of the cache that holds just them."""
        with self._lock:
            reused, best = self._find(key_of(items))
            if best is None:
                return 0, []
            if best is not self._pinned:
                self._entries.remove(best)
                self._entries.append(best)
        length = position_count(items[:reused], self._tokens_per_image)
        return reused, [layer.fork(length=length) for layer in best.cache]

    def clear(self) -> None:
        """Drops all entries but the pinned one."""
        with self._lock:
            self._entries.clear()

    def _find(self, key: Key) -> tuple[int, CachedPrefix | None]:
        """Returns the length of the longest cached prefix of `key` without its end, and an entry that holds it."""
        best, reused = None, 0
        for entry in (*self._entries, self._pinned) if self._pinned else tuple(self._entries):
            known = min(shared_count(entry.key, key), len(key) - 1)
            if known > reused:
                best, reused = entry, known
        return reused, best

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)


def key_of(items: Sequence[PromptItem]) -> Key:
    """Returns the items of a prompt with the digests of its images, which hold no pixels."""
    return tuple(item.digest if isinstance(item, ImageItem) else item for item in items)


def evaluate(cache: Sequence[KVCache]) -> None:
    """Computes the buffers of a cache now, because another thread could not."""
    mx.eval([layer.buffers for layer in cache])


class FeatureCache:
    """The `image_features` of earlier images, by their content. Several threads may use it.

    The least recently used entry goes first.

    Attributes:
        max_bytes: the most bytes of features. 0 keeps none.
        hits: number of cache hits so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self._entries: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of the features."""
        with self._lock:
            return self._nbytes()

    def get(self, image: ImageItem) -> NDArray[np.float32] | None:
        """Returns the features (1, N, C) of an image, or None. The array must not be written to."""
        with self._lock:
            features = self._entries.get(image.digest)
            if features is not None:
                self._entries.move_to_end(image.digest)
                self.hits += 1
            return features

    def holds(self, image: ImageItem) -> bool:
        """Returns whether the features of an image are cached, without counting a hit."""
        with self._lock:
            return image.digest in self._entries

    def put(self, image: ImageItem, image_features: NDArray[np.float32]) -> None:
        """Stores the features of an image."""
        with self._lock:
            self._entries[image.digest] = image_features
            self._entries.move_to_end(image.digest)
            while self._nbytes() > self.max_bytes:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Drops everything, so that the next answer shows its full time to first token."""
        with self._lock:
            self._entries.clear()

    def _nbytes(self) -> int:
        return sum(features.nbytes for features in self._entries.values())
