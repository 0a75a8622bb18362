"""Checks of options, texts and images before a model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.errors import ImageError, PromptError, UsageError
from fastvlm.runtime.fastvlm import FastVLM

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE
VARIED = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
"""Options under which random weights do not repeat one token."""

Write = Callable[..., Path]
Open = Callable[[Path], FastVLM]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 2},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": [""]},
        {"fit": "stretch"},
        {"system": 3},
    ],
    ids=str,
)
def test_usage_error_comes_at_once_when_an_option_is_wrong(vlm: FastVLM, options: dict) -> None:
    with pytest.raises(UsageError):
        vlm.stream(PICTURE, "Hi", **options)


def test_usage_error_when_the_prompt_is_no_text(vlm: FastVLM) -> None:
    with pytest.raises(UsageError, match="must be a string, got"):
        vlm.stream(None, b"Hi")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "caf\udce9"}, "the prompt is not valid Unicode at character 3: .*not UTF-8. Correct or convert it"),
        ({"system": "\ud800"}, "the system prompt is not valid Unicode at character 0"),
        ({"stop": ["a", "\udcff"]}, "the stop string is not valid Unicode at character 0"),
    ],
)
def test_text_that_no_file_could_hold_is_told_at_once(vlm: FastVLM, options: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        vlm.stream(None, **{"prompt": "Hi", **options})


def test_image_error_comes_at_once_when_an_image_is_missing(vlm: FastVLM, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        vlm.stream([PICTURE, tmp_path / "none.png"], "Hi")
