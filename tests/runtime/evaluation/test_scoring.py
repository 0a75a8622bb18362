"""The metrics against published values, their properties for any string, and the statistics against theory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.runtime.evaluation.scoring import (
    anls,
    exact_match,
    levenshtein,
    normalized_vqa_text,
    relaxed_accuracy,
    sign_test,
    vqa_accuracy,
    wilson_interval,
)

ANY_SPEED = settings(deadline=None, derandomize=True)
METRICS = (exact_match, vqa_accuracy, relaxed_accuracy, anls)
ANSWERS = st.lists(st.text(max_size=12), min_size=1, max_size=10)


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_answers_equals_the_published_table(agreeing: int, expected: float) -> None:
    answers = ["stop"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("Stop.", answers) == pytest.approx(expected)


@ANY_SPEED
@given(st.lists(st.sampled_from(["red", "blue", "12", "no"]), min_size=4, max_size=10), st.sampled_from(["red", "12"]))
def test_vqa_accuracy_is_the_mean_with_each_person_left_out(answers: list[str], prediction: str) -> None:
    left_out = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    expected = sum(min(1.0, rest.count(prediction) / 3) for rest in left_out) / len(answers)
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Stop-Sign", "stop sign"),
        ("100,978", "100978"),
        ("3.5 km.", "3.5 km"),
        ("two dogs, a cat", "2 dogs cat"),
        ("dont know", "don't know"),
        ("It\u2019s 2:50 pm", "it's 2:50 pm"),
        ("none", "0"),
        ("girl's", "girl's"),
        ("its", "its"),
        ("A", ""),
        ("$5 (five)", "$5 5"),
    ],
)
def test_vqa_text_follows_the_rules_of_the_challenge(text: str, expected: str) -> None:
    assert normalized_vqa_text(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("95", "100", 1.0),
        ("94.9", "100", 0.0),
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-95", "-100", 1.0),
        ("95", "-100", 0.0),
        ("0.42", "42%", 1.0),
        ("42", "42%", 0.0),
        ("1e2", "100", 1.0),
        ("0", "0.0", 1.0),
        ("0.01", "0", 0.0),
        ("Yes", "yes", 1.0),
        ("Yess", "yes", 0.0),
        ("nan", "nan", 1.0),
        ("100 people", "100", 0.0),
    ],
)
def test_relaxed_accuracy_allows_5_percent_of_a_number(prediction: str, answer: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("1995", ["1995"], 1.0),
        ("ITC Limited", ["itc  limited"], 1.0),
        ("1996", ["1995"], 0.75),
        ("ab", ["abcd"], 0.5),  # just at the threshold
        ("ab", ["abcde"], 0.0),  # below it
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6),
        ("", [""], 1.0),
        ("x", [""], 0.0),
    ],
)
def test_anls_is_the_best_similarity_above_one_half(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected)


def test_exact_match_ignores_case_spaces_and_the_final_stop() -> None:
    assert exact_match(" It is  RED. ", ["no", "it is red"]) == 1.0
    assert exact_match("It is reddish", ["it is red"]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@ANY_SPEED
@given(prediction=st.text(max_size=12), answers=ANSWERS)
def test_scores_are_in_0_to_1_in_any_order_of_answers(metric, prediction: str, answers: list[str]) -> None:
    score = metric(prediction, answers)
    assert 0.0 <= score <= 1.0
    assert metric(prediction, answers[::-1]) == score


@pytest.mark.parametrize("metric", METRICS)
@ANY_SPEED
@given(answer=st.text(max_size=12), count=st.integers(1, 10))
def test_unanimous_answer_has_the_full_score(metric, answer: str, count: int) -> None:
    assert metric(answer, [answer] * count) == 1.0


@ANY_SPEED
@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_examples(right: int, n: int, low: float, high: float) -> None:
    """The examples of Newcombe 1998, table I, method 3."""
    assert wilson_interval(right / n, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@ANY_SPEED
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_contains_the_accuracy_and_narrows(n: int, accuracy: float) -> None:
    low, high = wilson_interval(accuracy, n)
    assert 0 <= low <= accuracy <= high <= 1
    wider = wilson_interval(accuracy, max(1, n // 2))
    assert wider[1] - wider[0] >= high - low
    assert wilson_interval(0.0, n)[0] == 0.0
    assert wilson_interval(1.0, n)[1] == 1.0


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (2, 10, 2 * (1 + 12 + 66) / 2**12), (7, 7, 1.0)],
)
def test_sign_test_equals_hand_computed_values(better: int, worse: int, expected: float) -> None:
    assert sign_test(better, worse) == pytest.approx(expected)
    assert sign_test(worse, better) == pytest.approx(expected)


def test_sign_test_of_thousands_stays_in_range() -> None:
    assert 0 < sign_test(900, 1100) < 1e-5
    assert sign_test(5000, 5000) == pytest.approx(1.0, abs=0.01)
