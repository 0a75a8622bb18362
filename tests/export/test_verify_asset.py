"""The verification of a Core AI asset: which images the interpreter runs, and that wrong numbers fall short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm.export import verify_asset as verified
from fastvlm.export.recipe import PackageInterface
from fastvlm.export.verify import DecoderVerification, Verification
from fastvlm.export.verify_asset import ARITHMETIC_FLOOR_DB, AssetVerification, judged_places, verify_asset
from fastvlm.models.errors import VerificationError
from fastvlm.quant.calibration import ImageSet, verification_images
from fastvlm.quant.metrics import Agreement, WeightAudit

GOOD = Agreement(50.0, 1.0, 45.0, 0, 75.0, 1.0)
BAD = replace(GOOD, snr_db=20.0)
ASSET = AssetVerification(GOOD, {}, WeightAudit(), {}, {"photographs": GOOD}, images=1, arithmetic=GOOD)


def image_set(size: int) -> ImageSet:
    """Drawings, photographs and noise of one colour each, as the embedded set has them."""
    kinds = ("drawings", "drawings", "photographs", "photographs", "noise")
    pixels = tuple(np.full((3, size, size), 10 * place, np.uint8) for place in range(len(kinds)))
    return ImageSet(pixels, "embedded", kinds)


def of(encoder: object, asset: AssetVerification | None) -> Verification:
    decoder = DecoderVerification(GOOD, 0.0, 1, 1.0, 1, 1.0, 0, 16, WeightAudit())
    return Verification(encoder, 28.0, decoder, asset)


@pytest.mark.parametrize(("size", "places"), [(256, [0, 1, 2, 3]), (512, [0, 1, 2, 3]), (640, [2, 3]), (1024, [2])])
def test_large_images_are_few_and_photographs_first(size: int, places: list[int]) -> None:
    assert judged_places(image_set(size)) == places


def test_embedded_set_has_the_kinds_of_the_test() -> None:
    assert verification_images(64).kinds == image_set(64).kinds


def test_outputs_are_compared_with_their_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(640)
    expected = [np.full((1, 4, 8), 1.0 + place, np.float32) for place in range(5)]
    monkeypatch.setattr(verified, "run_images", lambda asset, chosen, _: [expected[2] * 1.001, expected[3] * 1.001])
    found = verify_asset(Path("x.aimodel"), images, expected, PackageInterface(), [expected[2], expected[3]])
    assert found.images == 2 and found.kinds.keys() == {"photographs"}
    assert 59 < found.output.snr_db < 61 and 59 < found.arithmetic.snr_db < 61
    monkeypatch.setattr(verified, "run_images", lambda asset, chosen, _: [expected[3], expected[2]])
    assert verify_asset(Path("x.aimodel"), images, expected, PackageInterface()).output.snr_db < 15


def test_result_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [np.ones((1, 4, 8), np.float32)] * 5
    monkeypatch.setattr(verified, "run_images", lambda asset, chosen, _: [np.full((1, 4, 8), np.nan)] * len(chosen))
    with pytest.raises(VerificationError, match=r"x\.aimodel"):
        verify_asset(Path("x.aimodel"), image_set(64), expected, PackageInterface())


def test_asset_below_its_floors_fails_the_folder() -> None:
    package = replace(ASSET, arithmetic=None)
    assert of(package, ASSET).passed and of(ASSET, ASSET).passed and of(package, None).passed
    (failure,) = of(package, replace(ASSET, kinds={"photographs": BAD})).failures
    assert failure.startswith("fastvithd.aimodel: image_features of photographs reach 20.0 dB, the floor is 28 dB")
    (failure,) = of(package, replace(ASSET, arithmetic=BAD)).failures
    assert f"the floor is {ARITHMETIC_FLOOR_DB:.0f} dB" in failure and "same weights" in failure
    alone = replace(ASSET, kinds={"photographs": BAD})
    (failure,) = of(alone, alone).failures  # reported once
    assert failure.startswith("image_features of photographs")


def test_figures_without_a_package_have_no_ranges() -> None:
    found = of(ASSET, ASSET).as_dict()
    assert "largest_activation" not in found["image_features"] and found["stages_snr_db"] == {}
    assert found["coreai"]["images"] == 1 and found["coreai"]["stored_weights"]["snr_db"] == 50.0
    assert "coreai" not in of(replace(ASSET, ranges={"x": 1.0}), None).as_dict()
