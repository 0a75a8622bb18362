"""Calibration images: the embedded sets, and the files of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm.models.errors import ImageError
from fastvlm.models.images import open_image, preprocess, to_pixel_values
from fastvlm.quant import calibration
from fastvlm.quant.calibration import (
    NOISE,
    PHOTOGRAPHS,
    calibration_images,
    folder_images,
    trial_images,
    verification_images,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with two images of different sizes and formats, and other files."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "b.JPG", format="JPEG")
    Image.fromarray(draw.integers(0, 256, (64, 64, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "c.png").write_bytes(b"\x01\x02\x03")
    (tmp_path / ".hidden.png").write_bytes(b"the Finder's")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_images_are_squared_and_sorted_by_name(folder: Path, fit: str) -> None:
    images = folder_images(folder, 128, fit)
    assert len(images) == 2
    for name, values in zip(("a.png", "b.JPG"), images, strict=True):
        expected = to_pixel_values(preprocess(open_image(folder / name), 128, fit))
        np.testing.assert_array_equal(values, expected)
        assert (values.shape, values.dtype) == ((1, 3, 128, 128), np.float32)


def test_broken_images_are_named_without_their_path(folder: Path) -> None:
    (note,) = folder_images(folder, 128, "pad").notes
    assert note.startswith("images skipped: c.png is not an image")
    assert str(folder) not in note
    for index in range(10):
        (folder / f"d{index}.png").write_bytes(b"")
    (note,) = folder_images(folder, 128, "pad").notes
    assert note.endswith("d2.png has 0 bytes, and 7 more")


def test_images_past_the_limit_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_FOLDER_IMAGES", 1)
    images = folder_images(folder, 128, "pad")
    assert len(images) == 1
    assert images.notes == ("images skipped: 2 files beyond the limit of 1",)


def test_folder_without_images_is_an_error(folder: Path) -> None:
    for name in ("a.png", "b.JPG"):
        (folder / name).unlink()
    with pytest.raises(ImageError, match=r"has no readable image \(c.png is not an image"):
        folder_images(folder, 128, "pad")
    with pytest.raises(ImageError, match=r"sub has no readable image \(none of .avif, .*\)"):
        folder_images(folder / "sub", 128, "pad")
    with pytest.raises(ImageError, match="is not a folder"):
        folder_images(folder / "gone", 128, "pad")


def test_manifest_entry_depends_on_the_content(folder: Path) -> None:
    first, again = folder_images(folder, 128, "pad").as_dict(), folder_images(folder, 128, "pad").as_dict()
    assert first == again
    assert (first["source"], first["images"]) == ("folder", 2)
    assert first["sha256"] != folder_images(folder, 128, "crop").as_dict()["sha256"]
    assert calibration_images(128).as_dict()["source"] == "embedded"


def test_slice_is_a_list_of_images(folder: Path) -> None:
    images = folder_images(folder, 128, "pad")
    np.testing.assert_array_equal(images[1:][0], images[1])
    assert len(list(images)) == 2
    assert calibration.MAX_FOLDER_IMAGES > 2


def test_embedded_sets_repeat_and_share_no_image() -> None:
    for images in (calibration_images(128), trial_images(128), verification_images(128)):
        for image in images:
            assert image.shape == (1, 3, 128, 128)
            assert image.dtype == np.float32
            assert image.std() > 0.05
        pictures = [image for image, kind in zip(images, images.kinds, strict=True) if kind != NOISE]
        assert 0 <= min(image.min() for image in pictures) < 0.2
        assert 0.8 < max(image.max() for image in pictures) <= 1
    assert calibration_images(128).kinds == ("drawings", "drawings", "photographs", "photographs")
    assert verification_images(128).kinds == (*calibration_images(128).kinds, NOISE)
    assert all(np.array_equal(a, b) for a, b in zip(calibration_images(128), calibration_images(128), strict=True))
    assert not any(np.array_equal(a, b) for a in calibration_images(128) for b in verification_images(128))


def test_noise_is_standard_normal_in_steps_of_a_byte() -> None:
    noise = verification_images(128)[-1]
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    np.testing.assert_array_equal(np.rint(noise * 255) / np.float32(255), noise)


def test_photographs_have_a_licence_and_belong_to_one_set() -> None:
    folder = Path(calibration.__file__).with_name("photographs")
    used = [name for names in PHOTOGRAPHS.values() for name in names]
    assert sorted(used) == sorted(path.name for path in folder.glob("*.jpg"))
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(used)
    assert all("CC0" in row or "public domain" in row for row in rows)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 600_000
