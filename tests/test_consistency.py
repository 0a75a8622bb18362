"""Rules that several folders of the source share."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastvlm.models.images import SUFFIXES
from fastvlm.quant.calibration import folder_images
from fastvlm.runtime.bulk.sources import Source


def test_captions_and_calibration_read_the_same_image_files(tmp_path: Path) -> None:
    for suffix in (*SUFFIXES, ".txt"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"picture{suffix}", "PNG")
    assert {".pgm", ".ico"} <= set(SUFFIXES)
    assert len(list(Source([tmp_path]))) == len(folder_images(tmp_path, 64, "pad")) == len(SUFFIXES)
