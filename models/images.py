"""Images in any form -> the squares of pixels that the vision encoder takes.

The geometry is LLaVA's `expand2square` and Hugging Face's `CLIPImageProcessor`, bit for bit.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from .errors import ImageError
from .quiet_libtiff import silence_libtiff
from .thin_images import resize_stripe_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageSource: TypeAlias = "Path | str | bytes | Image.Image | NDArray[Any]"
Fit = Literal["pad", "crop"]

MAX_PIXELS = 178_956_970
"""Pillow's own threshold for a decompression bomb: half a gigabyte of RGB."""

MAX_SIDE = 65_536
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the image upright. (ImageOps.exif_transpose also rewrites the metadata, and fails on
damaged ones.)"""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
"""What Pillow decodes itself: others would start programs (EPS: Ghostscript) or are no pictures of today."""

SUFFIXES = tuple(f".{kind}" for kind in "avif bmp gif ico jp2 jpeg jpg pgm png ppm tif tiff webp".split())
"""Files of other names in a folder are not images, and not looked at."""

THIN = 4
"""Height over width from which on it pays to leave out the black beside an image."""

STRIP_PIXELS = 2**22
"""Of the padded square, resized at a time: 16 MiB in Pillow's four bytes per pixel."""


def open_images(images: Sequence[ImageSource]) -> tuple[Image.Image, ...]:
    """Several images, of which all together may be as large as one. Raises ImageError as `open_image` does."""
    opened: list[Image.Image] = []
    for image in images:
        opened.append(open_image(image, MAX_PIXELS - sum(one.width * one.height for one in opened)))
    return tuple(opened)


def open_image(image: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`image`, decoded, upright (EXIF orientation applied) and RGB (alpha dropped).

    An array is (H, W, 3), (H, W, 4) or (H, W), uint8, RGB. `max_pixels` are what is left for it beside others.

    Raises:
        ImageError: there is no image, it is damaged, too large, or of a kind that cannot become RGB.
    """
    name = _name(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images (our own limit follows), of damaged metadata
            if isinstance(image, np.ndarray):
                image = _from_array(image)
            if isinstance(image, Image.Image):
                return _upright_rgb(image, name, max_pixels)
            with _stream(image, name) as stream, Image.open(stream, formats=_formats()) as opened:
                return _upright_rgb(opened, name, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image in a format that Pillow {PIL_VERSION} reads") from None
    except Image.DecompressionBombError as reason:
        raise ImageError(f"{name} is too large: {reason}") from None
    except OSError as reason:
        raise ImageError(f"{name} cannot be read: {reason.strerror or reason}") from reason
    except Exception as reason:  # decoders raise whatever damaged bytes lead them to
        detail = (str(reason) or type(reason).__name__).splitlines()[0]
        raise ImageError(f"{name} cannot be decoded: {detail}") from reason


def preprocess(image: Image.Image, image_size: int, fit: Fit) -> NDArray[np.uint8]:
    """(3, S, S) uint8 RGB of an RGB image.

    `pad` centres the image on a black square and resizes that to S; `crop` resizes the shorter side to S and keeps the
    centre. Both bicubic.

    Raises:
        ImageError: the image is so long and thin that fitting it would take absurd memory.
    """
    square = _padded(image, image_size) if fit == "pad" else _cropped(image, image_size)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, S, S)


def to_pixel_values(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(3, S, S) uint8 -> (1, 3, S, S) float32 from 0 to 1."""
    return pixels.astype(np.float32)[None] / np.float32(255)  # (1, 3, S, S)


def _padded(image: Image.Image, size: int) -> Image.Image:
    """The image centred on a black square of its longer side, resized to `size`.

    Pillow resizes rows first, then columns, with a rounding to uint8 between the two. Doing the rows strip by strip
    gives the same bits, and never holds the square, which is 900 megapixels for a screenshot of 1200 x 30000. Where
    most of a row is black, its part is not computed at all.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side))
    rows = max(1, STRIP_PIXELS // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        if THIN * image.width < side:
            stripe = np.asarray(image.crop((0, start, image.width, stop)))  # (rows, W, 3)
            narrow.paste(Image.fromarray(resize_stripe_rows(stripe, left, side, size)), (0, top + start))
            continue
        strip = image.crop((-left, start, side - left, stop))  # black where it reaches past the image
        narrow.paste(strip.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    longer = int(size * long / short)
    if longer * size > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} is too long and thin to crop: its shorter side at {size} "
            f"pixels makes the longer one {longer}; use fit 'pad', or cut it first"
        )
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _formats() -> list[str]:
    """`FORMATS`, but for those that this Pillow was built without."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _name(image: Any) -> str:
    if isinstance(image, str | Path):
        return str(image)
    return "the image" if isinstance(image, bytes | Image.Image | np.ndarray) else f"an image of {type(image).__name__}"


def _stream(image: Any, name: str) -> BinaryIO:
    if isinstance(image, bytes):
        if not image:
            raise ImageError("the image has 0 bytes")
        return io.BytesIO(image)
    if not isinstance(image, str | Path):
        raise ImageError(f"{name} is not supported: pass a path, bytes, a PIL image or a NumPy array")
    path = Path(image)
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    if not path.is_file():
        raise ImageError(f"{path} is a folder, not an image" if path.is_dir() else f"{path} is no regular file")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} has 0 bytes")
    return path.open("rb")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            "an image array should be uint8 of shape (H, W, 3), (H, W, 4) or (H, W); "
            f"found {array.dtype} of shape {array.shape}"
        )
    if 0 in array.shape:
        raise ImageError(f"an image array should hold pixels; found shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ImageError(
            f"{name} is too large: {width} x {height} pixels, where {MAX_PIXELS} in all and {MAX_SIDE} along a side "
            "are the most; scale it down"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name} ({width} x {height} pixels) is too large beside the other images: together they may have "
            f"{MAX_PIXELS} pixels; scale them down"
        )
    if image.format == "TIFF":
        silence_libtiff()
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    rgb = _without_high_depth(image, name).convert("RGB")
    transpose = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if transpose is None else rgb.transpose(transpose)


def _without_high_depth(image: Image.Image, name: str) -> Image.Image:
    """8 bits per channel: the upper ones of 16-bit gray, as of 16-bit RGB. (Pillow's `convert` clips gray to white.)"""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name} has 32 bits per pixel (mode {image.mode}), whose range is unknown; convert it to 8 bits"
        )
    return image
