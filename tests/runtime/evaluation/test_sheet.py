"""The sample sheet: the choice of answers, their colours and their text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFont

from fastvlm.runtime.evaluation import sheet
from fastvlm.runtime.evaluation.datasets import Sample
from fastvlm.runtime.evaluation.report import Answer, Evaluation

from .conftest import evaluation_of


def test_sheet_shows_wrong_and_right_answers_of_every_kind() -> None:
    texts = [("a", "b" if n % 5 == 0 else "a") for n in range(60)]
    chosen = sheet.choose(evaluation_of(texts).answers)
    assert len(chosen) == sheet.CELLS
    assert sum(answer.score < 1 for answer in chosen) == sheet.CELLS // 2
    assert sum(answer.sample.kind == "kind 0" for answer in chosen) == sheet.CELLS // 2
    assert [int(answer.sample.id) for answer in chosen] == sorted(int(answer.sample.id) for answer in chosen)


@pytest.mark.parametrize("texts", [[("a", "a")], [("a", "b")] * 3, [("a", "a")] * 30])
def test_sheet_takes_all_answers_up_to_its_cells(texts: list[tuple[str, str]]) -> None:
    assert len(sheet.choose(evaluation_of(texts).answers)) == min(len(texts), sheet.CELLS)


def test_sheet_repeats_an_image_only_if_it_has_to() -> None:
    answers = evaluation_of([("a", "a")] * 30).answers
    shared = [
        Answer(replace(one.sample, image=answers[n // 2].sample.image), one.text, one.score, "d", None)
        for n, one in enumerate(answers)
    ]
    chosen = sheet.choose(tuple(shared), cells=10)
    assert len({id(answer.sample.image) for answer in chosen}) == 10
    assert len(sheet.choose(tuple(shared), cells=24)) == 24


def test_sheet_colours_answers_by_their_score() -> None:
    right, wrong = (
        np.asarray(sheet.sample_sheet(evaluation_of([("some answer", given)]))) for given in ("some answer", "another")
    )

    def holds(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((pixels == colour).all(-1).any())

    assert (holds(right, sheet.RIGHT), holds(right, sheet.WRONG)) == (True, False)
    assert (holds(wrong, sheet.RIGHT), holds(wrong, sheet.WRONG)) == (False, True)
    assert holds(right, (0, 90, 200)), "the image itself"


def test_sheet_names_the_model_and_counts_its_answers() -> None:
    found = evaluation_of([("a", "b")] * 3 + [("a", "a")])
    assert sheet.title(found) == "a $\\frac$  folder, random weights: made, 4 questions, 25.0% right"
    assert sheet.shown(found, found.answers) == "shown: 4 of 4 answers, 1 right, 3 wrong"
    partly = (replace(found.answers[0], score=0.5), *found.answers[1:])
    assert sheet.shown(found, partly[:2]) == "shown: 2 of 4 answers, 0 right, 1 partly right, 1 wrong"


def test_sheet_is_as_wide_as_its_title() -> None:
    found = evaluation_of([("a", "b")])
    assert sheet.sample_sheet(found).width > ImageFont.load_default(20).getlength(sheet.title(found))


def test_sheet_is_drawn_with_any_text_and_a_missing_image() -> None:
    found = evaluation_of([("a" * 500, "\x00\n\u65e5" * 90), ("b", ""), ("c", "word " * 200)])
    lost = Answer(Sample("z", "gone.png", "q", ("a",), "k"), None, 0.0, "", None, error="gone.png does not exist")
    broken = Evaluation(found.data, (*found.answers, lost), {}, found.folder, {}, (), 1.0)
    assert sheet.sample_sheet(broken).width > 4 * sheet.PICTURE


@pytest.mark.parametrize("text", ["word " * 50, "x" * 300, "a b", ""])
def test_lines_fit_the_image(text: str) -> None:
    font = ImageFont.load_default(13)
    lines = sheet.wrapped(text, font, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= sheet.PICTURE for line in lines)
    if text == "a b":
        assert lines == ["a b"]
