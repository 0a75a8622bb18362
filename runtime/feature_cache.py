"""The features of the last few images, so that a second question about one of them does not encode it again."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES = 4
"""Remembered at once: 6 MB each at 1024 pixels, pixels and features together."""


class FeatureCache:
    """image_features by the pixels that they came from; the image used longest ago goes first.

    Pixels are compared whole: there is no digest that could collide, and comparing ends at the first byte that differs.

    Attributes:
        hits: how often features were remembered.
    """

    def __init__(self, images: int = IMAGES) -> None:
        self._entries: deque[tuple[bytes, NDArray[np.float32]]] = deque(maxlen=images)
        self.hits = 0

    def get(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """(1, N, C) features of (3, S, S) pixels, if they are remembered. Not to be written to."""
        content = pixels.tobytes()
        for index, (remembered, features) in enumerate(self._entries):
            if remembered == content:
                del self._entries[index]
                self._entries.append((remembered, features))
                self.hits += 1
                return features
        return None

    def holds(self, pixels: NDArray[np.uint8]) -> bool:
        """Returns whether the features of `pixels` are remembered, without counting a hit."""
        content = pixels.tobytes()
        return any(remembered == content for remembered, _ in list(self._entries))

    def put(self, pixels: NDArray[np.uint8], image_features: NDArray[np.float32]) -> None:
        """Remembers the features of `pixels`."""
        self._entries.append((pixels.tobytes(), image_features))

    def clear(self) -> None:
        """Forgets everything, so that the next answer shows the whole time to its first token."""
        self._entries.clear()
