"""The sample images of README and `make demo`: drawn by the generator from held-out seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvlm
from fastvlm.models.tiny.questions import Question, describe, is_right
from fastvlm.models.tiny.scenes import FIRST_SEED, draw_scene

pytestmark = pytest.mark.slow

SAMPLES = Path(fastvlm.__file__).parent / "runtime" / "samples"
SEEDS = {"shapes": 2_000_500_019, "word": 2_000_500_190, "number": 2_000_500_188}


@pytest.fixture(scope="module")
def model(shipped_tiny: Path) -> fastvlm.FastVLM:
    return fastvlm.load(shipped_tiny)


@pytest.mark.parametrize("name", SEEDS)
def test_sample_is_the_scene_of_its_held_out_seed(name: str) -> None:
    assert SEEDS[name] >= FIRST_SEED["heldout"]
    drawn = np.asarray(draw_scene(SEEDS[name]).image()).astype(int)
    shipped = np.asarray(Image.open(SAMPLES / f"{name}.png").convert("RGB")).astype(int)
    assert np.abs(drawn - shipped).mean() < 1  # Pillow's rasterizer may differ in a few edge pixels


@pytest.mark.parametrize("name", SEEDS)
def test_default_export_describes_the_sample_rightly(name: str, model: fastvlm.FastVLM) -> None:
    question = Question("describe", "Describe the image.", describe(draw_scene(SEEDS[name])))
    assert is_right(question, model.generate(SAMPLES / f"{name}.png", question.text).text)


def test_default_export_reads_the_sample_word(model: fastvlm.FastVLM) -> None:
    assert model.generate(SAMPLES / "word.png", "What is written?").text == "It says GATE."
