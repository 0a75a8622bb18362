"""Log-probabilities: those of a forward pass over the whole answer, in every way to ask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.errors import UsageError
from fastvlm.runtime.batch import Piece
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.generate import Generation
from fastvlm.runtime.logprobs import MAX_TOP, Logprobs
from fastvlm.runtime.request import prepare
from fastvlm.runtime.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("float32_decoder")

PROMPT = "What is it?"
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "seed": 4},
    {"temperature": 1.0, "seed": 2, "top_k": 5, "repetition_penalty": 1.5},
    {"choice": ["a cat", "a dog", "no"]},
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log(softmax(logits)) over the last axis, float64."""
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def recomputed(vlm: FastVLM, answer: Generation) -> np.ndarray:
    """Returns the log-probabilities (tokens, V) at each place of an answer to PROMPT, all computed at once."""
    ids = [*vlm.engine.prepare(prepare(None, PROMPT)).prompt_ids, *answer.token_ids]
    model = vlm.engine.language.language_model
    logits = model(model.embed(mx.array([ids])), all_positions=True)[0]
    return log_softmax(np.array(logits)[-len(answer.token_ids) - 1 : -1])


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=50), st.data())
def test_values_are_those_of_softmax(logits: list[float], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=4))
    found = Logprobs(len(ids) - 1)
    found.append(mx.array(logits), mx.array(ids))
    mx.eval(found.last)
    expected = log_softmax(np.array(logits, np.float32))[ids]
    one = found.read(0)
    assert (one.token_id, *(token_id for token_id, _ in one.top)) == tuple(ids)
    np.testing.assert_allclose([one.logprob, *(value for _, value in one.top)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_answer_reports_the_probabilities_of_the_model(vlm: FastVLM, options: dict[str, Any]) -> None:
    answer = vlm.generate(None, PROMPT, max_tokens=8, logprobs=3, **options)
    assert answer.logprobs is not None
    assert [one.token_id for one in answer.logprobs] == list(answer.token_ids) != []
    for one, expected in zip(answer.logprobs, recomputed(vlm, answer), strict=True):
        assert math.isclose(one.logprob, expected[one.token_id], abs_tol=2e-5)
        values = [value for _, value in one.top]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(expected)[::-1][:3], atol=2e-5)
        np.testing.assert_allclose(values, expected[[token_id for token_id, _ in one.top]], atol=2e-5)
    assert vlm.generate(None, PROMPT, max_tokens=8, **options).token_ids == answer.token_ids


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_way_to_ask_reports_the_same(vlm: FastVLM, options: dict[str, Any]) -> None:
    options = {"max_tokens": 8, "logprobs": 2, **options}
    alone = vlm.generate(None, PROMPT, **options)
    stream = vlm.stream(None, PROMPT, **options)
    found = [stream.read(), *vlm.generate_batch([None] * 2, PROMPT, **options)]
    pieces: list[Piece] = []
    with Scheduler(vlm.engine) as scheduler:
        listener = lambda event: pieces.append(event) if isinstance(event, Piece) else None  # noqa: E731
        found.append(scheduler.submit(prepare(None, PROMPT, **options), listener).result())
    assert alone.logprobs is not None
    for other in [*(one.logprobs for one in found), sum(pieces, Piece("", ())).logprobs]:
        assert other is not None
        assert [one.token_id for one in other] == [one.token_id for one in alone.logprobs]
        for one, expected in zip(other, alone.logprobs, strict=True):
            np.testing.assert_allclose(one.logprob, expected.logprob, atol=2e-5)
            np.testing.assert_allclose([v for _, v in one.top], [v for _, v in expected.top], atol=2e-5)


def test_nothing_is_reported_unless_it_is_asked_for(vlm: FastVLM) -> None:
    assert vlm.generate(None, PROMPT, max_tokens=3).logprobs is None
    alone = vlm.generate(None, PROMPT, max_tokens=3, logprobs=0).logprobs
    assert alone is not None
    assert [one.top for one in alone] == [()] * 3


@pytest.mark.parametrize("count", [-1, MAX_TOP + 1, True, 1.5, "2"])
def test_count_out_of_range_is_refused(vlm: FastVLM, count: Any) -> None:
    with pytest.raises(UsageError, match="logprobs must be from 0 to 20"):
        vlm.generate(None, PROMPT, logprobs=count)


def test_beams_have_none(vlm: FastVLM) -> None:
    with pytest.raises(UsageError, match="cannot be combined with logprobs"):
        vlm.generate(None, PROMPT, num_beams=2, logprobs=1)
