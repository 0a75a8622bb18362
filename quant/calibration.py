"""Images to calibrate exports on, and others to verify them on: embedded ones, or a folder of the user's.

The embedded images are drawn, seeded, the same on every machine: each set has a scene of the kind that `tiny` was
trained on, and a busier picture. They are not photographs, but hold what photographs do: smooth shading, hard edges,
fine texture, dark and bright, print.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, overload

import numpy as np

from ..models.errors import ImageError
from ..models.images import SUFFIXES, Fit, open_image, preprocess, to_pixel_values
from ..models.tiny.scenes import draw_scene, scene_seeds

SEEDS = {"calibration": 0, "trial": 50, "verification": 100}
"""Of the embedded sets; they share no picture."""

MAX_FOLDER_IMAGES = 32
"""Read from a folder at most: each is run two or three times, at seconds apiece for FastViTHD at 1024 pixels."""

MAX_LISTED = 4


@dataclass(frozen=True, eq=False)
class ImageSet(Sequence[np.ndarray]):
    """Images as `pixel_values` (1, 3, S, S) float32 RGB in 0..1, NCHW; held as bytes, made when asked for."""

    pixels: tuple[np.ndarray, ...]
    """(3, S, S) uint8 each."""
    source: str
    """`embedded` or `folder`."""
    notes: tuple[str, ...] = ()
    """What a user should know of files that were left out."""
    scale: float = 1.0
    """What each number is multiplied by."""

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return to_pixel_values(self.pixels[index]) * np.float32(self.scale)

    def scaled(self, scale: float) -> ImageSet:
        """The same images, every number times `scale`."""
        return replace(self, scale=scale)

    def as_dict(self) -> dict[str, str | int]:
        """What a manifest says of them: no names, no paths."""
        digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels in self.pixels)).hexdigest()
        return {"source": self.source, "images": len(self), "sha256": digest}


def calibration_images(image_size: int) -> ImageSet:
    """The embedded images to measure ranges and means on."""
    return _embedded("calibration", image_size)


def trial_images(image_size: int) -> ImageSet:
    """The embedded images that a search tries its plans on: others than those that biases are corrected on."""
    return _embedded("trial", image_size)


def verification_images(image_size: int) -> ImageSet:
    """The embedded images to judge an export by, which no calibration has seen."""
    return _embedded("verification", image_size)


def _embedded(name: str, image_size: int) -> ImageSet:
    seed = SEEDS[name]
    scene = draw_scene(scene_seeds("calibration", 1, start=seed)[0]).image()
    return ImageSet((preprocess(scene, image_size, "pad"), _busy_picture(image_size, seed)), "embedded")


def folder_images(folder: str | Path, image_size: int, fit: str) -> ImageSet:
    """The first MAX_FOLDER_IMAGES of a folder by name, made square as for answering (`fit`: `pad` or `crop`).

    Files that cannot be read as images are left out, and named in `notes`.

    Raises:
        ImageError: there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ImageError(f"{folder} is no folder; name one that holds images")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    pixels: list[np.ndarray] = []
    broken: list[str] = []
    for index, file in enumerate(files):
        if len(pixels) == MAX_FOLDER_IMAGES:
            broken.append(f"{len(files) - index} more than the {MAX_FOLDER_IMAGES} that are read")
            break
        try:
            pixels.append(preprocess(open_image(file), image_size, cast("Fit", fit)))
        except ImageError as reason:
            broken.append(str(reason).replace(str(file), file.name))  # a manifest tells it: no paths
    if not pixels:
        found = f": {broken[0]}" if broken else f" ({', '.join(SUFFIXES)})"
        raise ImageError(f"{folder} holds no image that can be read{found}")
    more = [f"and {len(broken) - MAX_LISTED} more"] if len(broken) > MAX_LISTED else []
    notes = (f"images left out: {'; '.join(broken[:MAX_LISTED] + more)}",) if broken else ()
    return ImageSet(tuple(pixels), "folder", notes)


def _busy_picture(size: int, seed: int) -> np.ndarray:
    """(3, S, S) uint8: a shaded background, discs and boxes of flat colour, a textured quarter."""
    draw = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size  # (S, S) each
    light, dark = draw.random((2, 3, 1, 1), dtype=np.float32)
    angle = draw.random() * 2 * np.pi
    shade = 0.5 + 0.5 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
    image = dark + (light - dark) * shade  # (3, S, S)
    for _ in range(8):
        (cx, cy), radius = draw.random(2), 0.05 + 0.15 * draw.random()
        inside = np.hypot(x - cx, y - cy) < radius
        if draw.random() < 0.5:
            inside = np.maximum(abs(x - cx), abs(y - cy)) < radius
        image = np.where(inside, draw.random((3, 1, 1), dtype=np.float32), image)
    texture = draw.random((3, size, size), dtype=np.float32)
    stripes = (np.sin(x * size * draw.uniform(0.3, 2.0)) > 0).astype(np.float32)
    image = np.where((x > 0.5) & (y > 0.5), texture, image)
    image = np.where((x < 0.25) & (y > 0.75), stripes, image)
    return np.round(image * 255).clip(0, 255).astype(np.uint8)
