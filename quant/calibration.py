"""The images for calibrating and verifying exports: embedded sets, or a folder of the user.

Each embedded set has drawings and photographs. The drawings are made with fixed seeds: a scene like those that `tiny`
was trained on, and a busier image with shading, hard edges and fine texture. The photographs are in the public domain
(`photographs/README.md`). Standard-normal noise shows the ranges of an encoder far from what it was trained on. Its
values are not those of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast, overload

import numpy as np

from ..models.ahead import Ahead
from ..models.errors import ImageError
from ..models.images import SUFFIXES, Fit, open_image, preprocess, to_pixel_values
from ..models.tiny.scenes import draw_scene, scene_seeds

SEEDS = {"calibration": 0, "trial": 50, "verification": 100}
"""The seeds of the embedded sets, which share no image."""

NOISE_SEED, CALIBRATION_NOISE_SEED = 200, 201
"""The seeds of the noise for verification and for measuring ranges."""

PHOTOGRAPHS = {
    "calibration": ("coffee.jpg", "rocket.jpg"),
    "trial": ("camera.jpg",),
    "verification": ("astronaut.jpg", "cat.jpg"),
}
"""The photographs of the embedded sets, in the folder `photographs`."""

Kind = Literal["drawings", "photographs", "noise", "images"]
"""The kind of an image. `images` are those of the user's folder."""

NOISE: Kind = "noise"

MAX_FOLDER_IMAGES = 32
"""The most images read from a folder. Each is run two or three times, and FastViTHD at 1024 px takes seconds."""

MAX_LISTED = 4
"""The most file names in a note."""


@dataclass(frozen=True, eq=False)
class ImageSet(Sequence[np.ndarray]):
    """Images as `pixel_values` (1, 3, S, S) float32 RGB in 0..1, NCHW. They are kept as multiples of 1/255."""

    pixels: tuple[np.ndarray, ...]
    """(3, S, S) each: uint8, and int16 for noise."""
    source: str
    """`embedded` or `folder`."""
    kinds: tuple[Kind, ...]
    """The kind of each image."""
    notes: tuple[str, ...] = ()
    """Remarks for the user about skipped files."""
    scale: float = 1.0
    """The factor of all pixel values."""

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

    def with_noise(self, seed: int) -> ImageSet:
        """Returns the same images and one of standard-normal noise, of the same size."""
        draw = np.random.Generator(np.random.PCG64(seed))
        noise = np.rint(255 * draw.standard_normal(self.pixels[0].shape, dtype=np.float32)).astype(np.int16)
        return replace(self, pixels=(*self.pixels, noise), kinds=(*self.kinds, NOISE))

    def scaled(self, scale: float) -> ImageSet:
        """Returns the same images with pixel values times `scale`."""
        return replace(self, scale=scale)

    def as_dict(self) -> dict[str, str | int]:
        """Returns the manifest's entry, which has no names and no paths."""
        digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels in self.pixels)).hexdigest()
        return {"source": self.source, "images": len(self), "sha256": digest}


def calibration_images(image_size: int) -> ImageSet:
    """Returns the embedded images for measuring ranges and means."""
    return _embedded("calibration", image_size)


def trial_images(image_size: int) -> ImageSet:
    """Returns the embedded images for the trials of a search. Biases are corrected on other images."""
    return _embedded("trial", image_size)


def verification_images(image_size: int) -> ImageSet:
    """Returns the embedded images for verification, which no calibration uses, with noise."""
    return _embedded("verification", image_size).with_noise(NOISE_SEED)


def _embedded(name: str, image_size: int) -> ImageSet:
    seed = SEEDS[name]
    scene = draw_scene(scene_seeds("calibration", 1, start=seed)[0]).image()
    drawings = (preprocess(scene, image_size, "pad"), busy_picture(image_size, seed))
    folder = Path(__file__).with_name("photographs")
    photographs = [preprocess(open_image(folder / file), image_size, "crop") for file in PHOTOGRAPHS[name]]
    kinds: list[Kind] = ["drawings"] * len(drawings)
    kinds += ["photographs"] * len(photographs)
    return ImageSet((*drawings, *photographs), "embedded", tuple(kinds))


def folder_images(folder: str | Path, image_size: int, fit: str) -> ImageSet:
    """Reads the first `MAX_FOLDER_IMAGES` of a folder by name, made square as for answers (`fit`: `pad` or `crop`).

    Files that cannot be read are skipped and named in `notes`.

    Raises:
        ImageError: the folder does not exist, or has no readable image.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder. Pass a folder of images.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    pixels: list[np.ndarray] = []
    broken: list[str] = []
    with Ahead(partial(_squared, file, image_size, cast("Fit", fit)) for file in files) as squares:
        for index, file in enumerate(files):
            if len(pixels) == MAX_FOLDER_IMAGES:
                broken.append(f"{len(files) - index} files beyond the limit of {MAX_FOLDER_IMAGES}")
                break
            try:
                pixels.append(next(squares))
            except ImageError as reason:
                broken.append(str(reason).replace(str(file), file.name))  # without paths, as it goes into a manifest
    if not pixels:
        found = broken[0] if broken else f"none of {', '.join(SUFFIXES)}"
        raise ImageError(f"{folder} has no readable image ({found}).")
    more = [f"and {len(broken) - MAX_LISTED} more"] if len(broken) > MAX_LISTED else []
    notes = (f"images skipped: {', '.join(broken[:MAX_LISTED] + more)}",) if broken else ()
    kinds: list[Kind] = ["images"] * len(pixels)
    return ImageSet(tuple(pixels), "folder", tuple(kinds), notes)


def _squared(file: Path, image_size: int, fit: Fit) -> np.ndarray:
    """Returns the pixels (3, S, S) of a file, uint8. Raises ImageError."""
    return preprocess(open_image(file), image_size, fit)


def busy_picture(size: int, seed: int) -> np.ndarray:
    """Draws (3, S, S) uint8: a shaded background, discs and boxes of flat colour, a textured quarter."""
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
