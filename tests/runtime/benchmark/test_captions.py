"""The benchmark of bulk captions: rates of each stage and of all, the slowest, and images that cannot be measured."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm.models.errors import ImageError
from fastvlm.runtime.benchmark.captions import CaptionBench, CaptionRates, report_of, table
from fastvlm.runtime.bulk.sources import Source
from fastvlm.runtime.fastvlm import FastVLM

RATES = CaptionRates(
    "m", 4, 1, "Why?", 8, 7.5, 2, "reference", "CPU", decode=20.0, encode=5.0, answer=4.0, pipeline=3.0
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images, a copy and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(np.full((20, 30, 3), 60 * n, np.uint8)).save(folder / f"{n}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_slowest_stage_limits_and_is_compared() -> None:
    assert RATES.limited_by == "answer"
    assert RATES.share == 0.75
    assert RATES.one_after_the_other == pytest.approx(1 / (0.05 + 0.2 + 0.25))
    assert dataclasses.replace(RATES, encode=1.0).limited_by == "encode"
    (row,) = report_of([RATES])["configurations"]
    assert row["images_per_second"] == {"decode": 20.0, "encode": 5.0, "answer": 4.0}
    text = "\n".join(table(RATES))
    assert "answer                              4.00  the slowest stage" in text
    assert "pipeline                            3.00  0.75 of the slowest stage" in text


def test_slow_encoder_is_found_to_limit(vlm: FastVLM, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = vlm.engine.encoder.encode

    def slow(pixel_values: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return encode(pixel_values)

    monkeypatch.setattr(vlm.engine.encoder, "encode", slow)
    bench, runs = CaptionBench(vlm, Source([pictures]), "What?", 1), []
    usual = vlm.engine.feature_cache
    found = bench.measured("m", 1, runs.append)
    assert runs == ["m (1 of 1)"]
    assert (found.images, found.tokens_per_image, found.encoder) == (3, 1, vlm.engine.encoder.name)
    assert found.limited_by == "encode" and found.encode < 10
    assert found.pipeline < 10 < found.decode, "the pipeline encodes, and decoding does not"
    assert vlm.engine.feature_cache is usual


def test_images_that_cannot_be_opened_are_an_error(vlm: FastVLM, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"no image can be opened: .*broken\.png"):
        CaptionBench(vlm, Source([tmp_path]), "What?", 1)
