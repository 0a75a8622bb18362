"""Batches: every answer is what it would be alone, however long its neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm.models.errors import FastVLMError, ImageError, PromptError, UsageError
from fastvlm.models.kv_cache import QuantizedKVCache
from fastvlm.runtime import batch as batch_module
from fastvlm.runtime.batch import Batch, requests_for
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.prompt_cache import CachedPrompt
from fastvlm.runtime.request import Request, prepare

from .conftest import EventLog

pytestmark = pytest.mark.usefixtures("float32_decoder")

PICTURE = np.indices((90, 120)).sum(0).astype(np.uint8)[..., None] * np.array([1, 0, 1], np.uint8)  # (90, 120, 3)
OTHER = 255 - PICTURE

pairs = st.lists(
    st.tuples(st.sampled_from([None, PICTURE, OTHER, [PICTURE, OTHER]]), st.text("abc ?é", max_size=30)),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(pairs=pairs, size=st.integers(1, 4), greedy=st.booleans(), lookahead=st.integers(0, 2))
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_one_by_one(
    vlm: FastVLM, pairs: list[tuple[Any, str]], size: int, greedy: bool, lookahead: int
) -> None:
    options: dict[str, Any] = {"max_tokens": 6}
    if not greedy:
        options |= {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2, "top_k": 40}
    images, prompts = [image for image, _ in pairs], [prompt for _, prompt in pairs]
    expected = [vlm.generate(image, prompt, **options) for image, prompt in pairs]
    found = list(Batch(vlm.engine, size, lookahead).outcomes(requests_for(images, prompts, options)))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [(one.text, one.finish_reason, one.prompt_tokens) for one in found] == [
        (one.text, one.finish_reason, one.prompt_tokens) for one in expected
    ]


def test_answers_are_those_of_one_by_one_in_8_bits(vlm: FastVLM) -> None:
    small = FastVLM(vlm.folder, vlm.engine.encoder, vlm.engine.language, vlm.engine.tokenizer, 1.0, kv_bits=8)
    prefilled = small.engine.prefill(prepare(PICTURE, "Hi"), CachedPrompt())
    assert {type(layer) for layer in prefilled.cache} == {QuantizedKVCache}
    prompts = ["Hi", "What is it?", "Why, then?"]
    expected = [small.generate(PICTURE, prompt, max_tokens=8, temperature=1.0, seed=1).token_ids for prompt in prompts]
    found = small.generate_batch([PICTURE] * 3, prompts, max_tokens=8, temperature=1.0, seed=1, batch_size=2)
    assert [one.token_ids for one in found] == expected


def varied(vlm: FastVLM, stops: list[tuple[str, ...]], lengths: list[int]) -> list[Request]:
    return [
        prepare(PICTURE, f"Question {n}", stop=stop, max_tokens=length, temperature=1.0, seed=n)
        for n, (stop, length) in enumerate(zip(stops, lengths, strict=True))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, 1])
def test_each_answer_ends_where_it_would_alone(vlm: FastVLM, lookahead: int) -> None:
    lengths = [1, 30, 7, 2, 12, 30]
    whole = [vlm.engine.stream(request).read().text for request in varied(vlm, [()] * 6, [30] * 6)]
    stops = [(), (whole[1][3:6],), (), (), (whole[4][5:7],), ("never comes",)]
    requests = varied(vlm, stops, lengths)
    expected = [vlm.engine.stream(request).read() for request in requests]
    assert {one.finish_reason for one in expected} >= {"stop", "length"}
    found = list(Batch(vlm.engine, 3, lookahead).outcomes(requests))
    assert [(one.token_ids, one.text, one.finish_reason) for one in found] == [
        (one.token_ids, one.text, one.finish_reason) for one in expected
    ]


@pytest.mark.parametrize(
    ("lookahead", "expected"),
    # after their first tokens: 1, 3, 2, 0 and 5 steps; the last answer is alone in its. A place that becomes free is
    # taken a step later where the next one has been launched.
    [(0, [2, 2, 2, 1, 1, 1, 1, 1]), (1, [2, 1, 2, 1, 1, 1, 1, 1, 1])],
)
def test_places_are_taken_by_the_next_and_ended_answers_drop_out(
    vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, lookahead: int, expected: list[int]
) -> None:
    sizes: list[int] = []
    original = batch_module.decode_one_token
    monkeypatch.setattr(
        batch_module, "decode_one_token", lambda d, tokens, c: sizes.append(tokens.size) or original(d, tokens, c)
    )
    requests = [prepare(None, f"Q{n}", max_tokens=length, ignore_eos=True) for n, length in enumerate([2, 4, 3, 1, 6])]
    found = list(Batch(vlm.engine, 2, lookahead).outcomes(requests))
    assert [len(one.token_ids) for one in found] == [2, 4, 3, 1, 6]
    assert sizes == expected


@pytest.mark.parametrize("greedy", [True, False])
def test_batch_reads_once_per_step_with_the_next_step_launched(
    vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, greedy: bool
) -> None:
    """Counts waits for the device: evaluations and reads of ids, apart from those that begin an answer."""
    rows, tokens, events = 8, 10, EventLog(monkeypatch)
    options = {} if greedy else {"temperature": 1.0, "seed": 1}
    requests = [prepare(None, f"Q{n}", max_tokens=tokens, ignore_eos=True, **options) for n in range(rows)]
    batch = Batch(vlm.engine, rows, lookahead=1)
    monkeypatch.setattr(batch_module.Batch, "_begin", events.apart(batch_module.Batch._begin))
    assert len(list(batch.outcomes(requests))) == rows
    steps = tokens - 1
    assert events.names == ["launch"] + ["launch", "read"] * (steps - 1) + ["read"]


def test_answer_reads_once_per_token_with_the_next_step_launched(
    vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, computing_on: Callable
) -> None:
    computing_on("gpu")
    request = prepare(None, "Hi", max_tokens=9, ignore_eos=True)
    events = EventLog(monkeypatch)
    monkeypatch.setattr(vlm.engine, "prefill", events.apart(vlm.engine.prefill))
    vlm.engine.stream(request).read()
    # The first id was read at the start: its item() finds it computed. The wait is for the cache that is kept.
    assert events.names == ["read", "launch"] + ["launch", "read"] * 7 + ["read", "wait"]


def test_requests_are_made_when_there_is_room(vlm: FastVLM) -> None:
    made: list[int] = []

    def requests() -> Iterator[Request]:
        for n in range(5):
            made.append(n)
            yield prepare(None, f"Q{n}", max_tokens=3, ignore_eos=True)

    answers = Batch(vlm.engine, 2).outcomes(requests())
    next(answers)
    assert made == [0, 1]
    assert len(list(answers)) == 4
    assert made == [0, 1, 2, 3, 4]


def test_errors_stand_in_their_places(vlm: FastVLM) -> None:
    fine = prepare(PICTURE, "Hi", max_tokens=2, ignore_eos=True)
    wrong = prepare(None, "Hi", max_tokens=2)
    wrong = type(wrong)((), fine.messages, None, wrong.options, 0.0)  # a message with an image, which is not there
    error = ImageError("broken")
    found = list(Batch(vlm.engine, 2).outcomes([fine, wrong, error, fine]))
    assert [type(one) for one in found] == [Generation, PromptError, ImageError, Generation]
    assert found[2] is error
    assert found[0].token_ids == found[3].token_ids


def test_first_error_is_raised(vlm: FastVLM, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone"):
        vlm.generate_batch([PICTURE, tmp_path / "gone.png"], "Hi", max_tokens=2)
    with pytest.raises(FastVLMError, match="<image>: 2, images: 1"):
        vlm.generate_batch([PICTURE], ["<image> <image>"])


def test_timings_are_each_answers_own(vlm: FastVLM) -> None:
    vlm.generate(None, "Hi", max_tokens=1)
    found = vlm.generate_batch([PICTURE, OTHER, None], "Hi", max_tokens=4, ignore_eos=True)
    assert all(one.timings.ttft_ms > 0 and one.timings.decode_tps > 0 and not one.timings.cold for one in found)
    assert [one.timings.generated_tokens for one in found] == [4, 4, 4]
    assert [one.timings.encode_ms > 0.001 for one in found[:2]] == [True, True]


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_usage_error_when_the_size_is_out_of_range(vlm: FastVLM, size: object) -> None:
    with pytest.raises(UsageError, match="batch_size must be"):
        vlm.generate_batch([None], "Hi", batch_size=size)  # type: ignore[arg-type]


def test_usage_error_when_images_and_prompts_differ_in_number(vlm: FastVLM) -> None:
    with pytest.raises(UsageError, match="got 2 prompts, 1 images"):
        vlm.generate_batch([None], ["a", "b"])
    assert vlm.generate_batch([], []) == []
