"""Opening images of every kind, and the encoder's squares, bit for bit."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pillow_heif
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastvlm.models import images
from fastvlm.models.errors import ImageError, UsageError
from fastvlm.models.images import open_image, preprocess, to_pixel_values

GOLDEN = sorted(
    f"{name}.{fit}"
    for name in ("square_256", "landscape_640x360", "portrait_233x517", "tiny_17x9", "wide_900x60", "gray_200x300",
                 "rgba_120x90", "palette_150x100")
    for fit in ("pad", "crop")
)  # fmt: skip


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def padded_then_resized(image: Image.Image, size: int) -> np.ndarray:
    """LLaVA's `expand2square`, then one resize: the definition."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize("key", [*GOLDEN, "exif6_320x180.pad"])
def test_pixels_equal_the_reference_bit_for_bit(golden: Path, key: str) -> None:
    name, fit = key.rsplit(".", 1)
    file = next((golden / "preprocess").glob(f"{name}.*"))
    expected = np.load(golden / "preprocess" / "expected_uint8.npz")[key]
    found = preprocess(open_image(file, background="none"), 256, fit)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("case", "name"), [(0, "square_256"), (1, "landscape_640x360"), (2, "portrait_233x517")])
def test_pixel_values_equal_the_reference(golden: Path, case: int, name: str) -> None:
    expected = np.load(golden / "llava_small_reparam_tied" / "expected.npz")[f"{case}.pixel_values"]
    found = to_pixel_values(preprocess(open_image(golden / "preprocess" / f"{name}.png"), 256, "pad"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 128]), st.integers(200, 5000), st.integers(0, 9))
@example(1, 5, 64, 200, 0)  # thin, and enlarged
@example(2, 40, 128, 200, 1)
def test_padding_in_strips_equals_padding_at_once(width: int, height: int, size: int, strip: int, seed: int) -> None:
    image = noise(width, height, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "STRIP_PIXELS", strip)
        np.testing.assert_array_equal(preprocess(image, size, "pad"), padded_then_resized(image, size))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr", "HSV"]),
    st.sampled_from(["pad", "crop"]),
)
def test_any_size_and_mode_gives_a_square(width: int, height: int, mode: str, fit: str) -> None:
    try:
        image = noise(width, height, mode)
    except ValueError:  # Pillow has no way from RGB to LA in some versions
        image = noise(width, height, "L").convert(mode)
    opened = open_image(image)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))
    pixels = preprocess(opened, 128, fit)
    assert (pixels.shape, pixels.dtype) == ((3, 128, 128), np.uint8)
    values = to_pixel_values(pixels)
    assert values.shape == (1, 3, 128, 128)
    assert 0 <= values.min() <= values.max() <= 1
    assert values.flags.c_contiguous


def test_pixel_values_reach_exactly_from_0_to_1() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    np.testing.assert_array_equal(to_pixel_values(ramp)[0, 0].reshape(-1), np.arange(256, dtype=np.float32) / 255)


def test_picture_is_the_same_from_every_source(tmp_path: Path) -> None:
    picture = noise(20, 10)
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(picture))
    sources = [file, str(file), file.read_bytes(), picture, np.asarray(picture), np.asarray(picture.convert("RGBA"))]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(picture))
    gray = np.asarray(picture)[..., 0]
    np.testing.assert_array_equal(np.asarray(open_image(gray))[..., 2], gray)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_upright_when_exif_has_an_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(24, 16), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no header", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_image_opens_when_its_metadata_are_damaged(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    assert open_image(encoded(noise(8, 6), "JPEG", exif=exif)).size == (8, 6)
    assert not recwarn.list


def test_photo_is_not_copied_but_a_given_image_is(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = encoded(noise(24, 16), "JPEG")
    given_image = Image.open(io.BytesIO(photo))
    assert open_image(given_image) is not given_image
    monkeypatch.setattr(Image.Image, "convert", None)
    found = open_image(photo)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(given_image.convert("RGB")))
    np.testing.assert_array_equal(preprocess(found, 64, "pad"), padded_then_resized(given_image, 64))


def test_source_image_is_unchanged() -> None:
    image = noise(9, 7, "P")
    before = image.copy()
    open_image(image)
    assert (image.mode, image.tobytes()) == ("P", before.tobytes())


def test_sixteen_bit_gray_keeps_its_upper_bits() -> None:
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    found = np.asarray(open_image(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(found[..., 0], (values >> 8).astype(np.uint8))


def tiff(values: np.ndarray, bits: int, tags: dict[int, int], samples: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of a square, with `tags` in addition to the required ones."""
    data, side = values.tobytes(), len(values)
    fields = {256: side, 257: side, 258: bits, 259: 1, 262: 1 if samples == 1 else 2, 273: 8, 277: samples, 278: side,
              279: len(data), **tags}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(fields)) + entries + bytes(4)


@pytest.mark.parametrize("tag", [281, 341])
def test_twelve_bits_in_sixteen_fill_the_range(tag: int) -> None:
    values = np.linspace(0, 4095, 64 * 64).astype("<u2").reshape(64, 64)
    found = np.asarray(open_image(tiff(values, 16, {tag: 4095})))[..., 0]
    np.testing.assert_array_equal(found, (values.astype(np.uint32) * 255 // 4095).astype(np.uint8))
    unmarked = np.asarray(open_image(tiff(values, 16, {})))[..., 0]
    np.testing.assert_array_equal(unmarked, (values >> 8).astype(np.uint8))


def test_packed_samples_of_twelve_bits_fill_the_range() -> None:
    values = np.linspace(0, 4095, 64 * 64).astype(np.uint32).reshape(64, 32, 2)
    first, second = values[..., 0], values[..., 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    found = np.asarray(open_image(tiff(packed.reshape(64, -1), 12, {})))[..., 0]
    np.testing.assert_array_equal(found, (values.reshape(64, 64) * 255 // 4095).astype(np.uint8))


@pytest.mark.parametrize("largest", [4095, 65535])
def test_portable_gray_map_of_deep_samples_is_read(largest: int) -> None:
    values = np.linspace(0, largest, 64).astype(">u2").reshape(8, 8)
    found = np.asarray(open_image(b"P5 8 8 %d\n" % largest + values.tobytes()))[..., 0]
    assert np.abs(found - values.astype(float) * 255 / largest).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_read_upright_as_a_jpeg_is(orientation: int) -> None:
    pillow_heif.register_heif_opener()
    picture = noise(64, 48).resize((128, 96), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(open_image(encoded(picture, "PNG", exif=exif)), np.int16)
    heic = encoded(picture, "HEIF", quality=-1, chroma=444, exif=exif.tobytes())  # as bytes it sets HEIF's rotation too
    found = np.asarray(open_image(heic), np.int16)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= 2  # lossless but for YCbCr


def transparent_logo(hidden: tuple[int, int, int]) -> Image.Image:
    """Returns a black bar on transparent ground, whose invisible color is `hidden`."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., :3] = hidden
    rgba[6:10] = (0, 0, 0, 255)
    rgba[2] = (200, 0, 0, 128)
    return Image.fromarray(rgba)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF", "array"])
def test_hidden_colors_never_show_by_default(kind: str) -> None:
    pillow_heif.register_heif_opener()
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}, "HEIF": {"quality": -1}}
    found = []
    for hidden in ((0, 0, 0), (9, 120, 250)):
        logo = transparent_logo(hidden)
        source = np.asarray(logo) if kind == "array" else encoded(logo, kind, **options.get(kind, {}))
        found.append(np.asarray(open_image(source), np.int16))
    if kind not in ("AVIF", "HEIF"):  # their blocks mix neighbors
        assert np.array_equal(found[0], found[1])
    assert found[0][14, 14].min() >= 250  # white
    assert found[0][8, 8].max() <= 5  # the bar


def test_half_transparent_pixels_are_mixed_with_the_ground() -> None:
    logo = encoded(transparent_logo((0, 0, 0)))
    white, black, none = (np.asarray(open_image(logo, background=name))[2, 0] for name in ("white", "black", "none"))
    assert white.tolist() == [227, 127, 127]
    assert black.tolist() == [100, 0, 0]
    assert none.tolist() == [200, 0, 0]
    with pytest.raises(UsageError, match="background must be one of white, black, none, got 'pink'"):
        open_image(logo, background="pink")


def test_first_frame_counts_when_an_image_moves() -> None:
    first, second = noise(8, 8, "P", 1), noise(8, 8, "P", 2)
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(first.convert("RGB")))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text", "the image is a text, not the file itself .it begins with 'hello, this is text'"),
        (b"\x01\x02\x03", "not an image in a format"),
        (b"\xff\x0a\x00\x00", "is a JPEG XL image.*Convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL image"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "is a camera's raw file"),
        (b"\0\0\0\x18ftypqt  \0\0\0\1", "is a video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "cannot be|damaged HEIF"),
        (b"8BPS\0\1", "is a Photoshop file"),
        (b"%PDF-1.7", "is a PDF document"),
        (b'<?xml version="1.0"?><svg/>', "perhaps an SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"\x00\x05\x16\x07\x00\x02", "is an AppleDouble file"),
        (encoded(noise(64, 64))[:300], "cannot be (read|decoded)"),
        (encoded(noise(64, 64), "JPEG")[:300], "cannot be (read|decoded)"),
        (png_header(30000, 30000), "too large: .*900000000 pixels"),
        (png_header(100_000, 1), "too large: .*got 100000 x 1"),
        ("/nonexistent/image.png", "/nonexistent/image.png does not exist"),
        ("a\nb", "does not exist"),
        (Path("/"), "is a folder"),
        ("/dev/null", "not a regular file"),
        (7, "an image of int is not supported"),
        (None, "an image of NoneType is not supported"),
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \(4, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 of shape \(4, 4, 2\)"),
        (np.zeros((3,), np.uint8), r"uint8 of shape \(3,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \(0, 4, 3\)"),
        (Image.new("F", (4, 4)), "32 bits per pixel"),
        (Image.new("I", (4, 4)), "32 bits per pixel"),
    ],
    ids=lambda value: f"{value.mode} image" if isinstance(value, Image.Image) else repr(value),
)
def test_image_error_in_one_line_when_there_is_no_picture(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value).replace("a\nb", "")


@pytest.mark.parametrize("failure", [struct.error("bad\nheader"), IndexError(), SyntaxError("broken"), MemoryError()])
def test_image_error_when_a_decoder_fails_in_its_own_way(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=r"^the image cannot be decoded: (bad|IndexError|broken|MemoryError)$"):
        open_image(b"data")


def test_own_limit_holds_when_pillows_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="too large: .*got 13500 x 13500"):
        open_image(png_header(13500, 13500))


def test_image_error_when_a_file_is_empty_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "empty.png"
    file.touch()
    with pytest.raises(ImageError, match=r"empty\.png has 0 bytes"):
        open_image(file)
    file.write_bytes(b"x")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"empty\.png cannot be read: Permission denied"):
        open_image(file)


@pytest.mark.skipif(
    not any(Path(PIL.__file__).parent.parent.glob("pillow.libs/libtiff*"))
    and not any(Path(PIL.__file__).parent.glob(".dylibs/libtiff*")),
    reason="only the libtiff in Pillow's wheel is silenced, and this Pillow brings none",
)
def test_libtiff_says_nothing_itself_of_a_damaged_file(capfd: pytest.CaptureFixture[str]) -> None:
    content = bytearray(encoded(noise(60, 40), "TIFF", compression="tiff_lzw"))
    content[20:200] = b"\xff" * 180
    with pytest.raises(ImageError, match="decoder error"):
        open_image(bytes(content))
    assert capfd.readouterr() == ("", "")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_a_picture_or_an_image_error(data: st.DataObject) -> None:
    pillow_heif.register_heif_opener()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "HEIF"]))
    content = bytearray(encoded(noise(16, 16), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(("width", "height"), [(12_000, 200), (200, 12_000)])
def test_padding_takes_little_memory_when_an_image_is_thin(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares: list[int] = []
    crop = Image.Image.crop

    def watched(self: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        squares.append((box[2] - box[0]) * (box[3] - box[1]))
        return crop(self, box)

    new = Image.new

    def watched_new(mode: str, size: tuple[int, int]) -> Image.Image:
        squares.append(size[0] * size[1])
        return new(mode, size)

    image = Image.new("RGB", (width, height), (200, 10, 90))
    monkeypatch.setattr(Image.Image, "crop", watched)
    monkeypatch.setattr(Image, "new", watched_new)
    pixels = preprocess(image, 128, "pad")
    assert pixels[0].max() > 10
    assert max(squares) <= images.STRIP_PIXELS  # the whole square has 144 million


def test_crop_is_refused_when_an_image_is_too_thin() -> None:
    image = Image.new("RGB", (20_000, 1))
    with pytest.raises(ImageError, match=r"20000 x 1 is too long and thin to crop: .* 20480000"):
        preprocess(image, 1024, "crop")


def test_images_together_may_be_as_large_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    small, large = np.zeros((6, 6), np.uint8), np.zeros((9, 9), np.uint8)
    assert [image.size for image in images.open_images([small, small])] == [(6, 6), (6, 6)]
    assert images.open_images([]) == ()
    with pytest.raises(ImageError, match=r"\(9 x 9 pixels\) is too large together with the other images"):
        images.open_images([small, large])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_thinnest_images_are_squared_or_refused(size: tuple[int, int], fit: images.Fit) -> None:
    try:
        assert images.preprocess(Image.new("RGB", size), 256, fit).shape == (3, 256, 256)
    except ImageError as reason:
        assert fit == "crop" and "too long and thin to crop" in str(reason)


@pytest.mark.parametrize(("width", "height", "size"), [(1, 700, 256), (7, 1023, 128), (60, 600, 64), (3, 100, 256)])
def test_thin_images_have_the_bits_that_pillow_gives(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    square = Image.new("RGB", (height, height))
    square.paste(image, ((height - width) // 2, 0))
    expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(preprocess(image, size, "pad"), expected)
