"""Features of images seen before are taken from memory, and change nothing but the time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.prompt_cache import FeatureCache

PICTURES = [np.full((90, 120, 3), value, np.uint8) for value in (0, 60, 120, 180, 240)]
ASKED = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}


def pixels(value: int) -> np.ndarray:
    return np.full((3, 8, 8), value, np.uint8)


def test_last_features_are_kept_and_the_oldest_used_go_first() -> None:
    cache = FeatureCache(max_images=2)
    features = [np.full((1, 1, 4), value, np.float32) for value in range(3)]
    for value in (0, 1):
        cache.put(pixels(value), features[value])
    assert cache.get(pixels(0)) is features[0]
    cache.put(pixels(2), features[2])
    assert cache.get(pixels(1)) is None
    assert cache.get(pixels(0)) is features[0]
    assert cache.get(pixels(2)) is features[2]
    assert cache.hits == 3
    cache.clear()
    assert cache.get(pixels(2)) is None


def test_pixels_that_are_written_to_later_are_no_other_images() -> None:
    cache, square = FeatureCache(), pixels(1)
    cache.put(square, np.zeros((1, 1, 4), np.float32))
    square[:] = 2
    assert cache.get(square) is None
    assert cache.get(pixels(1)) is not None


def test_second_question_about_an_image_does_not_encode_it_again(vlm: FastVLM) -> None:
    first = vlm.generate(PICTURES[1], "What is it?", max_tokens=1)
    second = vlm.generate(Image.fromarray(PICTURES[1]), "Why?", max_tokens=1)  # the same picture in another form
    assert len(vlm.engine.encoder.calls) == 1
    assert (first.timings.cached_images, second.timings.cached_images) == (0, 1)
    assert vlm.generate(PICTURES[1], "Why?", max_tokens=1, fit="crop").timings.cached_images == 0


@pytest.mark.parametrize(("order", "encoded"), [([0, 1, 0, 1], 2), ([0, 1, 2, 3, 4, 0], 6), ([2, 2, 2], 1)])
def test_answers_are_the_same_with_and_without_what_is_remembered(vlm: FastVLM, order: list[int], encoded: int) -> None:
    def ask(forget: bool) -> list[tuple[int, ...]]:
        ids = []
        for index in order:
            if forget:
                vlm.engine.feature_cache.clear()
            ids.append(vlm.generate(PICTURES[index], "What is it?", **ASKED).token_ids)
        return ids

    without, calls = ask(forget=True), len(vlm.engine.encoder.calls)
    assert calls == len(order)
    assert (len(set(without)) > 1) == (len(set(order)) > 1), "the answers should show which image was seen"
    vlm.engine.feature_cache.clear()
    assert ask(forget=False) == without
    assert len(vlm.engine.encoder.calls) == calls + encoded


def test_several_images_in_one_request_are_remembered_each(vlm: FastVLM) -> None:
    vlm.generate(PICTURES[:2], "Compare.", max_tokens=1)
    found = vlm.generate([PICTURES[1], PICTURES[2], PICTURES[0]], "Compare.", max_tokens=1)
    assert found.timings.cached_images == 2
    assert len(vlm.engine.encoder.calls) == 3
