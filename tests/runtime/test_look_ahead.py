"""Images that are encoded in another process while the decoder writes earlier answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import CrashError, FastVLMError
from fastvlm.models.images import to_pixel_values
from fastvlm.runtime.batch import Batch, BatchDecoder
from fastvlm.runtime.encoder_process import EncoderProcess
from fastvlm.runtime.encoders import Shapes
from fastvlm.runtime.engine import ENCODE_AHEAD, PreparedRequest
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.prompt_cache import ImageItem
from fastvlm.runtime.request import prepare
from fastvlm.runtime.scheduler import Scheduler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float32_decoder")]

CHILD = Path(__file__).with_name("bad_child.py")
IMAGES = [np.full((40, 60, 3), 20 * n, np.uint8) + np.arange(3, dtype=np.uint8) for n in range(9)]


class Means:
    """The encoder of `bad_child.py`, in process."""

    name, projected, compile_ms = "means", False, 0.0

    def __init__(self, image_size: int, channels: int) -> None:
        self.image_size, self.channels = image_size, channels

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        side = self.image_size // 64
        means = pixel_values.reshape(3, side, 64, side, 64).mean((2, 4)).reshape(3, -1).T[None]
        return np.pad(means, ((0, 0), (0, 0), (0, self.channels - 3)))


Make = Callable[..., FastVLM]


@pytest.fixture
def make(vlm: FastVLM) -> Iterator[Make]:
    """`make("segv", 3)`: the model with an encoder whose process goes wrong at the third image."""
    made: list[FastVLM] = []

    def make(fault: str = "none", when: object = "never", once: object = "-") -> FastVLM:
        program = (str(CHILD), fault, str(when), str(once))
        encoder = EncoderProcess(vlm.folder.package, Shapes.of(vlm.config), program=program)
        made.append(FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.fixture
def expected(vlm: FastVLM) -> list[tuple[int, ...]]:
    """The ids of each image's answer, one by one, encoded in process."""
    encoder = Means(vlm.config.image_size, vlm.config.mm_hidden_size)
    alone = FastVLM(vlm.folder, encoder, vlm.engine.language, vlm.engine.tokenizer, 0.0)
    return [alone.generate(image, f"Q{n}", **options_of(n)).token_ids for n, image in enumerate(IMAGES)]


def options_of(n: int) -> dict[str, Any]:
    return {"max_tokens": 3 + 2 * n % 7, "temperature": 1.0, "seed": n, "ignore_eos": True}


def requests() -> Iterator[Any]:
    return (prepare(image, f"Q{n}", **options_of(n)) for n, image in enumerate(IMAGES))


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_batch_gives_the_ids_of_each_image_alone(size: int, seconds: float, make: Make, expected: list) -> None:
    outcomes = list(Batch(make("slow", seconds).engine, size).outcomes(requests()))
    assert [outcome.token_ids for outcome in outcomes if isinstance(outcome, Generation)] == expected


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_scheduler_gives_the_ids_of_each_image_alone(seconds: float, make: Make, expected: list) -> None:
    with Scheduler(make("slow", seconds).engine, 3) as scheduler:
        answers = [scheduler.submit(request) for request in requests()]
        assert [answer.result(60).token_ids for answer in answers] == expected
        assert max(answer.queue_ms for answer in answers) > 0


def test_crash_fails_one_answer_of_the_scheduler(make: Make, expected: list, tmp_path: Path) -> None:
    with Scheduler(make("segv", 3, tmp_path / "once").engine, 2) as scheduler:
        answers = [scheduler.submit(request) for request in requests()]
        with pytest.raises(CrashError):
            answers[2].result(60)
        others = [n for n in range(len(answers)) if n != 2]
        assert [answers[n].result(60).token_ids for n in others] == [expected[n] for n in others]
        assert (scheduler.stats().finished, scheduler.stats().failed) == (len(others), 1)


def test_next_images_are_submitted_while_answers_are_decoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, waiting = make(), []
    original = BatchDecoder.step

    def step(batch: BatchDecoder) -> list:
        waiting.append(len(model.engine._pending))
        return original(batch)

    monkeypatch.setattr(BatchDecoder, "step", step)
    list(Batch(model.engine, 2).outcomes(requests()))
    assert max(waiting) == ENCODE_AHEAD


def test_requests_are_taken_two_ahead_at_most(make: Make) -> None:
    taken: list[int] = []

    def counted() -> Iterator[Any]:
        for n, request in enumerate(requests()):
            taken.append(n)
            yield request

    outcomes = Batch(make().engine, 1).outcomes(counted())
    for n, _ in enumerate(outcomes):
        assert len(taken) <= n + 2 + ENCODE_AHEAD


def test_crash_is_the_error_of_one_image(make: Make, expected: list, tmp_path: Path) -> None:
    outcomes = list(Batch(make("segv", 3, tmp_path / "once").engine, 2).outcomes(requests()))
    failed = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, FastVLMError)]
    assert failed == [2], outcomes[failed[0]]
    assert isinstance(outcomes[2], CrashError)
    for n, outcome in enumerate(outcomes):
        assert n == 2 or outcome.token_ids == expected[n]


def test_image_that_is_asked_about_twice_is_encoded_once(make: Make) -> None:
    model = make("exit", 3)  # a third image would end the process
    again = [prepare(IMAGES[n // 4], f"Q{n}", max_tokens=3, ignore_eos=True) for n in range(8)]
    outcomes = list(Batch(model.engine, 2).outcomes(again))
    assert [type(outcome) for outcome in outcomes] == [Generation] * 8
    assert sum(outcome.timings.cached_images for outcome in outcomes) == 6


def test_question_may_have_more_images_than_there_is_room_for(make: Make, vlm: FastVLM) -> None:
    alone = FastVLM(
        vlm.folder,
        Means(vlm.config.image_size, vlm.config.mm_hidden_size),
        vlm.engine.language,
        vlm.engine.tokenizer,
        0,
    )
    images = IMAGES[:5]
    expected = alone.generate(images, "Hi", max_tokens=4, ignore_eos=True).token_ids
    requests = [prepare(images, "Hi", max_tokens=4, ignore_eos=True) for _ in range(2)]
    assert [found.token_ids for found in Batch(make().engine, 1).outcomes(requests)] == [expected] * 2


def test_decoder_waits_less_than_encoding_takes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes steps longer, and waits for images no longer: the two are not compared by wall time."""
    original = BatchDecoder.step

    def step(batch: BatchDecoder) -> list:
        time.sleep(0.1)
        return original(batch)

    model = make("slow", 0.2)
    model.engine.encoder.wait_ready()
    monkeypatch.setattr(BatchDecoder, "step", step)
    asked = [prepare(image, "Hi", max_tokens=3, ignore_eos=True) for image in IMAGES[:6]]  # two steps each
    waited_ms = [outcome.timings.encode_ms for outcome in Batch(model.engine, 1).outcomes(asked)]
    assert waited_ms[0] > 100
    assert sum(waited_ms) < 0.6 * 6 * 200


def test_prepared_request_is_encoded_once_its_images_are(make: Make) -> None:
    model = make("slow", 0.2)
    prepared = model.engine.encode_ahead(prepare(IMAGES[0], "Hi"))
    image = next(item for item in prepared.items if isinstance(item, ImageItem))
    assert isinstance(prepared, PreparedRequest)
    assert not prepared.is_encoded
    np.testing.assert_array_equal(
        prepared.submitted[0].result(),
        Means(model.config.image_size, model.config.mm_hidden_size).encode(to_pixel_values(image.pixels)),
    )
    assert prepared.is_encoded
