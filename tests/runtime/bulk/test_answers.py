"""Answers about subjects: in their order, several per subject, and without waiting for images that are not ready."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from fastvlm.models.errors import ImageError
from fastvlm.runtime.batch import BatchDecoder
from fastvlm.runtime.bulk.answers import Asked, answers
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.request import prepare


@pytest.fixture
def asked(vlm: FastVLM) -> Callable[..., Asked[int]]:
    """A function that prepares `count` requests about an image of one gray value."""

    def make(value: int, count: int = 1) -> Asked[int]:
        image = np.full((8, 8, 3), value, np.uint8)
        request = prepare(image, "What?", max_tokens=5, ignore_eos=True)
        return Asked(value, tuple(vlm.engine.prepare(request) for _ in range(count)))

    return make


def test_each_subject_has_its_answers_in_order(vlm: FastVLM, asked: Callable[..., Asked[int]]) -> None:
    error = ImageError("no image")
    subjects = [lambda: asked(10, 2), lambda: Asked(20, (error,)), lambda: asked(30, 3)]
    found = list(answers(vlm.engine, subjects, 2, 2))
    assert [(one.subject, len(one.outcomes)) for one in found] == [(10, 2), (20, 1), (30, 3)]
    assert found[1].outcomes == (error,)
    alone = vlm.generate(np.full((8, 8, 3), 30, np.uint8), "What?", max_tokens=5, ignore_eos=True)
    assert [one.text for one in found[2].outcomes if isinstance(one, Generation)] == 3 * [alone.text]


def test_running_answer_continues_while_an_image_is_decoded(
    vlm: FastVLM, asked: Callable[..., Asked[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, original = threading.Semaphore(0), BatchDecoder.step

    def step(decoder: BatchDecoder) -> list:
        found = original(decoder)
        steps.release()
        return found

    monkeypatch.setattr(BatchDecoder, "step", step)
    seen: list[bool] = []

    def slow() -> Asked[int]:
        seen.extend(steps.acquire(timeout=10) for _ in range(3))
        return asked(20)

    found = list(answers(vlm.engine, [lambda: asked(10), slow], 2, 2))
    assert [one.subject for one in found] == [10, 20]
    assert seen == [True] * 3, "the first answer waited for the second image"


def test_error_of_a_subject_ends_the_run_and_its_threads(vlm: FastVLM, asked: Callable[..., Asked[int]]) -> None:
    def fail() -> Asked[int]:
        raise ImageError("the archive ends here")

    found = answers(vlm.engine, [lambda: asked(10), fail], 2, 2)
    with pytest.raises(ImageError, match="the archive"):
        list(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastvlm-ahead")]
