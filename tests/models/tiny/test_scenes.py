"""Drawn scenes: their layout, their image, and the splits of their seeds."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.models.tiny.questions import KINDS, questions_about
from fastvlm.models.tiny.scenes import (
    COLOURS,
    FIRST_SEED,
    MARGIN,
    MAX_CHARACTERS,
    MAX_SCENES,
    MIN_DISTANCE,
    PLACES,
    SCENE_SIZE,
    SHAPES,
    draw_scene,
    place_of,
    scene_seeds,
)

seeds = st.integers(0, 3 * 10**9)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_scene_has_up_to_four_shapes_in_distinct_places(seed: int) -> None:
    scene = draw_scene(seed)
    things = [*scene.objects, *([scene.text] if scene.text else [])]

    assert 1 <= len(scene.objects) <= 4
    assert len({thing.place for thing in things}) == len(things)
    for thing in things:
        for position in (thing.x, thing.y):
            borders = (SCENE_SIZE / 3, SCENE_SIZE * 2 / 3, 64, 128, 192)
            assert all(abs(position - border) >= MARGIN for border in borders)
    assert len({one.patch for one in scene.objects}) == len(scene.objects)
    for one, other in itertools.combinations(scene.objects, 2):
        assert math.hypot(one.x - other.x, one.y - other.y) >= MIN_DISTANCE * (one.radius + other.radius)
    places = [PLACES.index(one.place) for one in scene.objects]
    assert places == sorted(places)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(seeds)
def test_text_is_inside_the_image_and_not_covered(seed: int) -> None:
    scene = draw_scene(seed)
    if scene.text is None:
        return
    half_width, half_height = scene.text.extent
    assert 1 <= len(scene.text.content) <= MAX_CHARACTERS
    assert half_width <= scene.text.x <= SCENE_SIZE - half_width
    assert half_height <= scene.text.y <= SCENE_SIZE - half_height
    for one in scene.objects:
        nearest_x = max(abs(one.x - scene.text.x) - half_width, 0)
        nearest_y = max(abs(one.y - scene.text.y) - half_height, 0)
        assert math.hypot(nearest_x, nearest_y) > one.radius


def test_image_is_reproducible_and_has_each_colour_in_place() -> None:
    for seed in range(40):
        scene = draw_scene(seed)
        pixels = np.asarray(scene.image())
        assert pixels.shape == (SCENE_SIZE, SCENE_SIZE, 3)
        assert (pixels == np.asarray(draw_scene(seed).image())).all()
        for one in scene.objects:
            if one.shape == "ring":  # its middle is empty
                continue
            middle = pixels[round(one.y) - 2 : round(one.y) + 3, round(one.x) - 2 : round(one.x) + 3]
            assert np.abs(middle.mean((0, 1)) - np.array(COLOURS[one.colour])).max() < 30


def test_scenes_have_every_shape_colour_place_and_question() -> None:
    scenes = [draw_scene(seed) for seed in range(200)]

    assert {one.shape for scene in scenes for one in scene.objects} == set(SHAPES)
    assert {one.colour for scene in scenes for one in scene.objects} == set(COLOURS)
    assert {one.place for scene in scenes for one in scene.objects} == set(PLACES)
    asked = [questions_about(scene, np.random.default_rng(scene.seed)) for scene in scenes]
    assert {question.kind for questions in asked for question in questions} == set(KINDS)


def test_scenes_are_those_of_the_shipped_weights() -> None:
    digest = hashlib.sha256()
    for seed in range(300):
        scene = draw_scene(seed)
        draw = np.random.Generator(np.random.PCG64([seed, 3]))
        digest.update(repr((scene.objects, scene.text, questions_about(scene, draw, 4))).encode())

    # A new digest means that the generator changed, which needs new weights.
    assert digest.hexdigest() == "ef5cee91904ea5c4f0b86f788b053f67cfc402456c88c68d73301af0eeca961a"


def test_place_of_returns_the_nine_places() -> None:
    assert [place_of(x, y) for y in (10, 128, 250) for x in (10, 128, 250)] == list(PLACES)


def test_splits_share_no_seed() -> None:
    spans = [scene_seeds(split, MAX_SCENES) for split in FIRST_SEED]
    for one, other in itertools.combinations(spans, 2):
        assert one.stop <= other.start or other.stop <= one.start


def test_scene_seeds_beyond_the_split_are_refused() -> None:
    with pytest.raises(ValueError, match="a split has"):
        scene_seeds("train", 2, start=MAX_SCENES - 1)
