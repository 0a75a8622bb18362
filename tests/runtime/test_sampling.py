"""Sampling: greedy, with a seed, among the likeliest candidates, and with a penalty for repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvlm.models._mlx import mx
from fastvlm.models.errors import UsageError
from fastvlm.runtime import sampling
from fastvlm.runtime.sampling import FEW, Sampler, SamplingOptions, candidate_count, cut, id_on_host, sample

LOGITS = mx.array([1.0, 4.0, 3.5, -2.0, 0.5, 2.0, 3.0, -8.0])
logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def draws(options: SamplingOptions, count: int = 300, logits: mx.array = LOGITS) -> list[int]:
    keys = mx.random.split(mx.random.key(options.seed or 0), count)
    noise = [mx.random.gumbel((candidate_count(logits.size, options),), key=key) for key in keys]
    return [id_on_host(sample(logits, options, one)) for one in noise]


def kept(logits: list[float], **options: float) -> list[int]:
    """Returns the ranks that `cut` keeps."""
    descending = mx.array(sorted(logits, reverse=True))
    found = cut(descending, mx.softmax(descending), SamplingOptions(temperature=1.0, **options))
    return np.flatnonzero(np.isfinite(np.array(found))).tolist()


@given(logit_lists)
def test_greedy_takes_the_likeliest(logits: list[float]) -> None:
    assert id_on_host(Sampler(SamplingOptions())(mx.array(logits))) == int(np.argmax(np.array(logits, np.float32)))


@settings(deadline=None, max_examples=30)
@given(logit_lists, st.integers(0, 2**64 - 1), st.floats(0.05, 5), st.floats(0.1, 1), st.integers(0, 50))
def test_one_seed_gives_one_answer(
    logits: list[float], seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    options = SamplingOptions(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    first, second = Sampler(options), Sampler(options)
    mx.random.seed(seed % 1000)  # the global state plays no part
    ids = [id_on_host(first(mx.array(logits))) for _ in range(4)]
    mx.random.seed(1)
    assert ids == [id_on_host(second(mx.array(logits))) for _ in range(4)]
    assert all(0 <= i < len(logits) for i in ids)


def test_seeds_differ_and_steps_differ() -> None:
    flat = mx.zeros(1000)
    runs = [[id_on_host(s(flat)) for _ in range(5)] for s in (Sampler(SamplingOptions(1.0, seed=n)) for n in range(3))]
    assert len({tuple(run) for run in runs}) == 3
    assert all(len(set(run)) > 1 for run in runs)
    unseeded = [id_on_host(Sampler(SamplingOptions(1.0))(flat)) for _ in range(5)]
    assert len(set(unseeded)) > 1


def test_draws_follow_the_distribution() -> None:
    found = np.bincount(draws(SamplingOptions(temperature=2.0), 4000), minlength=8) / 4000
    expected = np.exp(np.array(LOGITS) / 2)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)  # 4 standard deviations


def test_draws_follow_the_distribution_within_top_k() -> None:
    found = np.bincount(draws(SamplingOptions(temperature=1.0, top_k=3), 4000), minlength=8) / 4000
    expected = np.where(np.isin(np.arange(8), [1, 2, 6]), np.exp(np.array(LOGITS)), 0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.035)


@given(logit_lists, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(logits: list[float], top_p: float) -> None:
    found = kept(logits, top_p=top_p)
    probabilities = np.exp(np.sort(np.array(logits, np.float64))[::-1] - max(logits))
    probabilities /= probabilities.sum()
    assert found == list(range(len(found)))
    assert probabilities[: len(found)].sum() >= top_p - 1e-5
    assert probabilities[: len(found) - 1].sum() < top_p + 1e-5


@given(logit_lists, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough(logits: list[float], min_p: float) -> None:
    found = kept(logits, min_p=min_p)
    ratios = np.exp(np.sort(np.array(logits, np.float64))[::-1] - max(logits))
    assert found == list(range(len(found)))
    assert ratios[len(found) - 1] >= min_p * (1 - 1e-4)
    assert all(ratio < min_p * (1 + 1e-4) for ratio in ratios[len(found) :])


@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 100])
def test_top_k_draws_only_from_the_likeliest(top_k: int) -> None:
    likeliest = set(np.argsort(-np.array(LOGITS))[:top_k].tolist())
    assert set(draws(SamplingOptions(temperature=50.0, top_k=top_k))) == likeliest


def test_cuts_work_together_in_order() -> None:
    assert set(draws(SamplingOptions(temperature=50.0, top_k=4, min_p=0.99))) == {1, 2}
    assert set(draws(SamplingOptions(temperature=1.0, top_k=3, top_p=0.8))) == {1, 2}  # 0.51, 0.31, 0.19 of the three
    assert set(draws(SamplingOptions(temperature=1.0, top_p=0.01))) == {1}


def sorted_whole(logits: mx.array, options: SamplingOptions, key: mx.array) -> int:
    """Returns a token as `sample` draws it, with the whole vocabulary in order."""
    order = mx.argsort(-logits / options.temperature)
    ordered = logits[order] / options.temperature
    chosen = mx.random.categorical(cut(ordered, mx.softmax(ordered), options), key=key)
    return id_on_host(order[chosen])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([FEW, FEW + 1, 3 * FEW]), st.sampled_from([0.02, 1, 3, 12]),
    st.floats(0.3, 3), st.floats(0.05, 0.999), st.sampled_from([0, 0.001, 0.2]),
    st.sampled_from(["all", "ties", "some are impossible"]),
)  # fmt: skip
@example(1, 3 * FEW, 0.02, 1.0, 0.9, 0.0, "all")
@example(1, 3 * FEW, 1, 1.0, 0.5, 0.0, "ties")
def test_ids_are_those_of_a_whole_sort(
    seed: int, size: int, spread: float, temperature: float, top_p: float, min_p: float, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    drawn = (spread * rng.standard_normal(size)).astype(np.float32)
    if kind == "ties":
        drawn = np.round(drawn)
    if kind == "some are impossible":
        drawn[rng.permutation(size)[: size - 1 - seed % size]] = -np.inf
    logits, key = mx.array(drawn), mx.random.key(seed)
    options = SamplingOptions(temperature=temperature, top_p=top_p, min_p=min_p)
    found = sample(logits, options, mx.random.gumbel((size,), key=key))
    assert id_on_host(found) == sorted_whole(logits, options, key)


@pytest.mark.parametrize(("spread", "cpu", "whole"), [(3.0, True, 0), (0.01, True, 1), (3.0, False, 1)])
def test_vocabulary_is_sorted_on_gpus_and_if_few_are_not_enough(
    spread: float, cpu: bool, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "on_cpu", lambda: cpu)
    sizes: list[int] = []
    sort = sampling.descending
    monkeypatch.setattr(sampling, "descending", lambda logits, count: sizes.append(logits.size) or sort(logits, count))
    logits = mx.array((spread * np.random.default_rng(0).standard_normal(20 * FEW)).astype(np.float32))
    sample(logits, SamplingOptions(temperature=0.5, top_p=0.9), mx.zeros(logits.size))
    assert sizes == [logits.size] * whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty_lowers_what_was_seen(temperature: float) -> None:
    options = SamplingOptions(temperature=temperature, top_k=1, repetition_penalty=10.0)
    sampler = Sampler(options, prompt_ids=(2, 2, -2, 4000))  # ids outside the vocabulary are ignored
    assert [id_on_host(sampler(LOGITS)) for _ in range(4)] == [1, 6, 5, 0]


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=3.0), prompt_ids=(0,))
    assert id_on_host(sampler(mx.array([-1.0, -2.0, -9.0]))) == 1


def test_repetition_penalty_below_1_repeats_more() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=0.5), prompt_ids=(5,))
    assert [id_on_host(sampler(LOGITS)) for _ in range(3)] == [1, 1, 1]
    assert id_on_host(Sampler(SamplingOptions(repetition_penalty=0.4), prompt_ids=(5,))(LOGITS)) == 5


def test_low_temperature_does_not_overflow_in_float16() -> None:
    logits = mx.array([99.0, 100.0, 0.0], mx.float16)
    assert id_on_host(Sampler(SamplingOptions(temperature=1e-3, seed=0))(logits)) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
        ("top_p", [0, -1, 1.01, math.nan, "x"]),
        ("top_k", [-1, 2.5, math.nan, True]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1, math.inf, math.nan]),
        ("seed", [-1, 2**64, 1.5, "x"]),
    ],
)
def test_usage_error_names_the_option_out_of_range(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{name} must be .*, got {value!r}$"):
            SamplingOptions(**{name: value})
