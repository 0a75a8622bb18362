"""Images from any source, and the square of pixels that the vision encoder takes.

The geometry is LLaVA's `expand2square` and Hugging Face's `CLIPImageProcessor`, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from .errors import ImageError, UsageError
from .foreign_files import HEAD_BYTES, foreign_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

ImageSource: TypeAlias = "Path | str | bytes | Image.Image | NDArray[Any]"
Fit = Literal["pad", "crop"]

MAX_PIXELS = 178_956_970
"""The largest image in pixels, half a gigabyte of RGB. It is Pillow's threshold for a decompression bomb."""

MAX_SIDE = 65_536
"""The longest side of an image, in pixels."""

MAX_IMAGE_BYTES = 2**29
"""The largest image in an archive, or for another machine, in bytes: an uncompressed one of 179 megapixels."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that brings an image upright, by its EXIF orientation. (`ImageOps.exif_transpose` also rewrites the
metadata, and fails on damaged ones.)"""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
"""The formats that Pillow decodes itself. Others start programs (EPS: Ghostscript) or are obsolete."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""The brands of HEIC and HEIF files, an iPhone's default, at byte 8. pillow-heif decodes them."""

SUFFIXES = tuple(f".{kind}" for kind in "avif bmp gif heic heif hif ico jp2 jpeg jpg pgm png ppm tif tiff webp".split())
"""The suffixes of image files. Other files in a folder are ignored."""

THIN = 4
"""The ratio of height to width from which it pays to skip the black columns of a padded image."""

STRIP_PIXELS = 2**22
"""The size of the strips in which a padded square is resized, in pixels. One takes 16 MiB in Pillow."""

RESAMPLE_BITS = 22
"""The fractional bits of Pillow's resampling coefficients."""
BICUBIC_SUPPORT = 2.0
"""The radius of the bicubic kernel, in output pixels."""


BACKGROUNDS: dict[str, tuple[int, int, int] | None] = {"white": (255, 255, 255), "black": (0, 0, 0), "none": None}
"""The color under transparent pixels. None drops the alpha channel, as LLaVA does, and shows the hidden colors."""

FULL_DEPTH = 65535
"""The white of a 16-bit channel, unless the file has a smaller one."""
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 281, 341
"""TIFF tags: the bits of a sample, and its largest value (two generations of the tag)."""


def open_images(
    images: Sequence[ImageSource], max_pixels: int | None = None, *, background: str = "white"
) -> tuple[Image.Image, ...]:
    """Opens several images, which together have at most `max_pixels`. Raises the errors of `open_image`.

    The default is `MAX_PIXELS`.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    opened: list[Image.Image] = []
    for image in images:
        left = limit - sum(one.width * one.height for one in opened)
        opened.append(open_image(image, left, background=background))
    return tuple(opened)


def open_image(image: ImageSource, max_pixels: int = MAX_PIXELS, *, background: str = "white") -> Image.Image:
    """Returns `image` decoded, upright (EXIF orientation applied) and RGB.

    An array is (H, W, 3), (H, W, 4) or (H, W), uint8, RGB. `max_pixels` is the part of the limit that is left for it.
    Transparent pixels are drawn on `background`: `white`, `black`, or `none`, which drops the alpha channel.

    Raises:
        UsageError: `background` is none of these.
        ImageError: the image is missing, damaged, too large, or of a mode that cannot become RGB.
    """
    name, head = _name(image), b""
    color = background_color(background)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images (our own limit follows) and damaged metadata
            if isinstance(image, np.ndarray):
                image = _from_array(image)
            if isinstance(image, Image.Image):
                return _upright_rgb(image, name, max_pixels, color)
            with _stream(image, name) as stream:
                head = stream.read(HEAD_BYTES)
                stream.seek(0)
                with Image.open(stream, formats=_formats(head)) as opened:
                    return _upright_rgb(opened, name, max_pixels, color, own=True)
    except ImageError:
        raise
    except UnidentifiedImageError:
        if foreign := foreign_image(head):
            raise ImageError(f"{name} is {foreign}") from None
        raise ImageError(f"{name} is not an image in a format that Pillow {PIL_VERSION} reads") from None
    except Image.DecompressionBombError as reason:
        raise ImageError(f"{name} is too large: {reason}") from None
    except OSError as reason:
        raise ImageError(f"{name} cannot be read: {reason.strerror or reason}") from reason
    except Exception as reason:  # decoders raise any exception for damaged bytes
        detail = (str(reason) or type(reason).__name__).splitlines()[0]
        raise ImageError(f"{name} cannot be decoded: {detail}") from reason


def file_bytes(path: Path) -> bytes:
    """Returns the bytes of an image file, to be decoded elsewhere.

    Raises:
        ImageError: the file is missing, empty, unreadable or too large. The first three are errors of `open_image` too.
    """
    try:
        with _stream(path, str(path)) as stream:
            size = path.stat().st_size
            if size > MAX_IMAGE_BYTES:
                raise ImageError(f"{path} must have at most {MAX_IMAGE_BYTES:,} bytes (got {size:,}).")
            return stream.read()
    except OSError as reason:
        raise ImageError(f"{path} cannot be read: {reason.strerror or reason}") from reason


def background_color(background: str) -> tuple[int, int, int] | None:
    """Returns the color that a background's name means. Raises UsageError for an unknown name."""
    if background not in BACKGROUNDS:
        raise UsageError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r:.40}", "background")
    return BACKGROUNDS[background]


def preprocess(image: Image.Image, image_size: int, fit: Fit) -> NDArray[np.uint8]:
    """Returns the pixels (3, S, S) of an RGB image, uint8.

    `pad` centres the image on a black square and resizes that to S; `crop` resizes the shorter side to S and keeps the
    centre. Both use bicubic resampling.

    Raises:
        ImageError: the image is so long and thin that cropping it would exceed the limit of pixels.
    """
    square = _padded(image, image_size) if fit == "pad" else _cropped(image, image_size)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, S, S)


def to_pixel_values(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns pixels (3, S, S) uint8 as (1, 3, S, S) float32 from 0 to 1."""
    return pixels.astype(np.float32)[None] / np.float32(255)  # (1, 3, S, S)


def _padded(image: Image.Image, size: int) -> Image.Image:
    """Returns the image centred on a black square of its longer side, resized to `size`.

    Pillow resizes rows first, then columns, and rounds to uint8 in between. Strips of rows give the same bits and
    never need the square, which has 900 megapixels for a screenshot of 1200 x 30000. The black columns of a thin image
    are skipped.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side))
    if image.width == side:  # no black columns, so nothing is copied
        narrow.paste(image.resize((size, image.height), Image.Resampling.BICUBIC), (0, top))
        return narrow.resize((size, size), Image.Resampling.BICUBIC)
    rows = max(1, STRIP_PIXELS // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        if THIN * image.width < side:
            stripe = np.asarray(image.crop((0, start, image.width, stop)))  # (rows, W, 3)
            narrow.paste(Image.fromarray(_resize_stripe_rows(stripe, left, side, size)), (0, top + start))
            continue
        strip = image.crop((-left, start, side - left, stop))  # black where it reaches past the image
        narrow.paste(strip.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _resize_stripe_rows(stripe: NDArray[np.uint8], left: int, side: int, size: int) -> NDArray[np.uint8]:
    """Returns (H, size, 3): rows of `side` pixels resized to `size`, black but for `stripe` (H, W, 3) at column `left`.

    Pillow would read the black pixels too, 3.6 billion of them for an image of 1 x 60000. They add nothing to a sum, so
    only the stripe's own columns count. The arithmetic is Pillow's (`src/libImaging/Resample.c`): coefficients in
    float64, rounded to 22 bits. Sums of integers are exact in float64.
    """
    height, width = stripe.shape[:2]
    columns, weights = _stripe_weights(left, width, side, size)
    rows = stripe.transpose(0, 2, 1).reshape(-1, width).astype(np.float64)  # (H * 3, W)
    sums = np.floor((rows @ weights + 2.0 ** (RESAMPLE_BITS - 1)) / 2.0**RESAMPLE_BITS)
    resized = np.zeros((height, size, 3), np.uint8)
    made = np.clip(sums, 0, 255).astype(np.uint8).reshape(height, 3, -1)  # (H, 3, columns)
    resized[:, columns] = made.transpose(0, 2, 1)
    return resized


def _stripe_weights(left: int, width: int, side: int, size: int) -> tuple[slice, NDArray[np.float64]]:
    """Returns the output columns that depend on the stripe, and the integer weights (W, columns) of its own columns."""
    scale = side / size
    support = BICUBIC_SUPPORT * max(scale, 1.0)
    first = max(0, int((left - support) / scale) - 1)
    last = min(size, int((left + width + support) / scale) + 2)
    weights = np.zeros((width, last - first))
    for column in range(first, last):
        begin, taps = _coefficients(column, scale, side)
        start, stop = max(begin, left), min(begin + len(taps), left + width)
        if start < stop:
            weights[start - left : stop - left, column - first] = taps[start - begin : stop - begin]
    return slice(first, last), weights


def _coefficients(column: int, scale: float, side: int) -> tuple[int, NDArray[np.float64]]:
    """Returns the first input pixel of an output pixel, and the weights from that pixel on."""
    filter_scale = max(scale, 1.0)
    center, support = (column + 0.5) * scale, BICUBIC_SUPPORT * filter_scale
    begin, end = max(0, int(center - support + 0.5)), min(side, int(center + support + 0.5))
    x = np.abs((np.arange(end - begin) + begin - center + 0.5) * (1.0 / filter_scale))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= np.cumsum(weights)[-1]  # summed in order, as Pillow does
    scaled = weights * 2.0**RESAMPLE_BITS
    return begin, np.trunc(np.where(weights < 0, scaled - 0.5, scaled + 0.5))


def _cropped(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    longer = int(size * long / short)
    if longer * size > MAX_PIXELS:
        raise ImageError(
            f"an image of {image.width} x {image.height} is too long and thin to crop: with a shorter side of {size} "
            f"pixels, the longer one has {longer}. Use fit='pad', or cut it first."
        )
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _formats(head: bytes) -> list[str]:
    """Returns those of `FORMATS` that this build of Pillow has, or HEIF if a file starts as one."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        import pillow_heif

        pillow_heif.register_heif_opener()
        return ["HEIF"]
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
        raise ImageError(f"{name} is not supported. Pass a path, bytes, a PIL image or a NumPy array.")
    path = Path(image)
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    if not path.is_file():
        raise ImageError(f"{path} is a folder, not an image" if path.is_dir() else f"{path} is not a regular file")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} has 0 bytes")
    return path.open("rb")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            "an image array must be uint8 of shape (H, W, 3), (H, W, 4) or (H, W), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if 0 in array.shape:
        raise ImageError(f"an image array must not be empty, got shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright_rgb(
    image: Image.Image, name: str, max_pixels: int, background: tuple[int, int, int] | None, own: bool = False
) -> Image.Image:
    """Returns an image upright and in RGB. One that is nobody else's (`own`) need not be copied."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ImageError(
            f"{name} is too large: must have at most {MAX_PIXELS} pixels and sides of {MAX_SIDE}, got "
            f"{width} x {height}. Scale it down."
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name} ({width} x {height} pixels) is too large together with the other images: must have at most "
            f"{max_pixels} pixels. Scale them down."
        )
    if image.format == "TIFF":
        silence_libtiff()
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if own and image.format == "JPEG" and image.mode == "RGB":
        rgb = image  # without the 50 MB that `convert` copies of a photo
    else:
        rgb = _on_background(_without_high_depth(image, name), background)
    transpose = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if transpose is None else rgb.transpose(transpose)


def _on_background(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """Returns an RGB image with `background` under its transparent pixels.

    The colors of fully transparent pixels are arbitrary: encoders change them, often to black.
    """
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(rgba, mask=alpha)
    return rgb


def _without_high_depth(image: Image.Image, name: str) -> Image.Image:
    """Returns an image of 8 bits per channel, scaled by the file's largest value. (Pillow's `convert` clips 16 bits.)

    Files of 12 bits in 16, from microscopes and cameras, would be almost black otherwise.
    """
    white = _white(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        scaled = values >> 8 if white == FULL_DEPTH else values.astype(np.uint32) * 255 // white
        return Image.fromarray(np.minimum(scaled, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"{name} has 32 bits per pixel (mode {image.mode}) of unknown range. Convert it to 8 bits.")
    if white != FULL_DEPTH and image.mode in ("RGB", "RGBA"):  # Pillow keeps the upper 8 bits of each 16
        return image.point([min(255, value * FULL_DEPTH // white) for value in range(256)] * len(image.getbands()))
    return image


def _white(image: Image.Image) -> int:
    """Returns the largest value of a channel of 16 bits, which a TIFF may have in its tags."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return FULL_DEPTH
    bits = max(_numbers(tags.get(BITS_PER_SAMPLE)), default=16)
    written = [*_numbers(tags.get(MAX_SAMPLE_VALUE)), *_numbers(tags.get(S_MAX_SAMPLE_VALUE))]
    if 8 < bits < 16:
        return 2**bits - 1
    return max(written) if bits == 16 and written and 255 < max(written) < FULL_DEPTH else FULL_DEPTH


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, tuple | list) else [value]
    return [int(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool) and one > 0]


@functools.cache
def silence_libtiff() -> None:
    """Removes the error handler of the libtiff in Pillow's wheel, which writes to stderr, for the whole process.

    Pillow itself only removes the handler of warnings. Another libtiff keeps its own.
    """
    package = Path(PIL.__file__).parent
    for library in (*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)
