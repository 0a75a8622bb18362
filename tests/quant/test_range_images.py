"""The images for ranges: calibration images, variations and other drawings, the same every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastvlm.quant.calibration import ImageSet, calibration_images, verification_images
from fastvlm.quant.range_images import DRAWINGS, VARIATIONS, range_images, resized


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return range_images(calibration_images(128).scaled(2.0), 64)


def test_embedded_images_have_variations_and_drawings(images: ImageSet) -> None:
    assert len(images) == len(images.kinds) == 4 + 2 * DRAWINGS + VARIATIONS
    assert {pixels.shape for pixels in images.pixels} == {(3, 64, 64)}
    assert images.scale == 2.0
    assert len({pixels.tobytes() for pixels in images.pixels}) == len(images), "no two are equal"
    for kept, own in zip(images.pixels, calibration_images(64).pixels, strict=False):
        np.testing.assert_array_equal(kept, own)


def test_range_images_are_the_same_every_time(images: ImageSet) -> None:
    again = range_images(calibration_images(128), 64)
    assert all(np.array_equal(a, b) for a, b in zip(images.pixels, again.pixels, strict=True))


def test_range_images_share_none_with_verification(images: ImageSet) -> None:
    verified = {pixels.tobytes() for pixels in verification_images(64).pixels}
    assert not verified & {pixels.tobytes() for pixels in images.pixels}


def test_images_of_a_folder_are_resized_and_varied() -> None:
    folder = replace(calibration_images(128), source="folder", kinds=("images",) * 4)
    found = range_images(folder, 64)
    assert len(found) == 4 + VARIATIONS
    assert set(found.kinds) == {"images"}
    np.testing.assert_array_equal(found.pixels[0], resized(folder.pixels[0], 64))
