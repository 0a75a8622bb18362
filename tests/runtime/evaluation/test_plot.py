"""The pictures of an evaluation: confusion counts, the axes that are drawn, and the sample sheet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFont

from fastvlm.models.errors import MachineError
from fastvlm.runtime.evaluation import plot
from fastvlm.runtime.evaluation.datasets import Sample
from fastvlm.runtime.evaluation.plot import mixups, word_in
from fastvlm.runtime.evaluation.run import Answer, Evaluation

from .conftest import evaluation_of

WORDS = ("top", "top left", "left", "red", "blue")


def test_mixups_count_expected_and_given_words() -> None:
    found = evaluation_of(
        [
            ("It is red.", "It is red."),
            ("It is red.", "Blue!"),
            ("It is blue.", "I cannot tell."),
            ("It is at the top left.", "at the top"),
            ("Nothing of these.", "red"),
        ]
    )
    counts = mixups(found.answers, WORDS)
    expected = np.zeros((5, 6), np.int64)
    expected[3, 3] = expected[3, 4] = expected[4, 5] = expected[1, 0] = 1
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("TOP LEFT", "top left"),
        ("the top, left of it", "top"),
        ("reddish", None),
        ("infrared", None),
        ("", None),
        ("a red top", "red"),
    ],
)
def test_words_are_found_whole_and_the_longest_first(text: str, word: str | None) -> None:
    assert word_in(text, WORDS) == word


@pytest.mark.slow
def test_plot_draws_a_table_for_each_kind_with_words() -> None:
    pytest.importorskip("matplotlib", reason="plots need the plot extra")
    texts = [("It is red.", "It is blue."), ("It is at the left.", "It is at the left.")] * 3
    found = evaluation_of(texts, {"kind 0": ("red", "blue"), "kind 1": ("left",), "kind 2": ("unasked",)})
    figure = plot.accuracy_figure(found)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["", "kind 0", "kind 1"]
    figure.draw_without_rendering()  # lays out all text, with the untrusted path
    shades = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shades, [[0, 1, 0], [0, 0, 0]])
    assert "random weights" in figure.get_suptitle()
    assert len(plot.accuracy_figure(evaluation_of(texts)).axes) == 1


def test_plot_without_matplotlib_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'pip install "fastvlm\[plot\]"'):
        plot.require_matplotlib()


def test_sheet_shows_wrong_and_right_answers_of_every_kind() -> None:
    texts = [("a", "b" if n % 5 == 0 else "a") for n in range(60)]
    chosen = plot.choose(evaluation_of(texts).answers)
    assert len(chosen) == plot.CELLS
    assert sum(answer.score < 1 for answer in chosen) == plot.CELLS // 2
    assert sum(answer.sample.kind == "kind 0" for answer in chosen) == plot.CELLS // 2
    assert [int(answer.sample.id) for answer in chosen] == sorted(int(answer.sample.id) for answer in chosen)


@pytest.mark.parametrize("texts", [[("a", "a")], [("a", "b")] * 3, [("a", "a")] * 30])
def test_sheet_takes_all_answers_up_to_its_cells(texts: list[tuple[str, str]]) -> None:
    assert len(plot.choose(evaluation_of(texts).answers)) == min(len(texts), plot.CELLS)


def test_sheet_repeats_an_image_only_if_it_has_to() -> None:
    answers = evaluation_of([("a", "a")] * 30).answers
    shared = [
        Answer(replace(one.sample, image=answers[n // 2].sample.image), one.text, one.score, "d", None)
        for n, one in enumerate(answers)
    ]
    chosen = plot.choose(tuple(shared), cells=10)
    assert len({id(answer.sample.image) for answer in chosen}) == 10
    assert len(plot.choose(tuple(shared), cells=24)) == 24


def test_sheet_colours_answers_by_their_score() -> None:
    right, wrong = (
        np.asarray(plot.sample_sheet(evaluation_of([("some answer", given)]))) for given in ("some answer", "another")
    )

    def holds(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((pixels == colour).all(-1).any())

    assert (holds(right, plot.RIGHT), holds(right, plot.WRONG)) == (True, False)
    assert (holds(wrong, plot.RIGHT), holds(wrong, plot.WRONG)) == (False, True)
    assert holds(right, (0, 90, 200)), "the image itself"


def test_sheet_names_the_model_and_counts_its_answers() -> None:
    found = evaluation_of([("a", "b")] * 3 + [("a", "a")])
    assert plot.title(found) == "a $\\frac$  folder, random weights: made, 4 questions, 25.0% right"
    assert plot.shown(found, found.answers) == "shown: 4 of 4 answers, 1 right, 3 wrong"
    partly = (replace(found.answers[0], score=0.5), *found.answers[1:])
    assert plot.shown(found, partly[:2]) == "shown: 2 of 4 answers, 0 right, 1 partly right, 1 wrong"


def test_sheet_is_as_wide_as_its_title() -> None:
    found = evaluation_of([("a", "b")])
    assert plot.sample_sheet(found).width > ImageFont.load_default(20).getlength(plot.title(found))


def test_sheet_is_drawn_with_any_text_and_a_missing_image() -> None:
    found = evaluation_of([("a" * 500, "\x00\n\u65e5" * 90), ("b", ""), ("c", "word " * 200)])
    lost = Answer(Sample("z", "gone.png", "q", ("a",), "k"), None, 0.0, "", None, error="gone.png does not exist")
    broken = Evaluation(found.data, (*found.answers, lost), {}, found.folder, {}, (), 1.0)
    assert plot.sample_sheet(broken).width > 4 * plot.PICTURE


@pytest.mark.parametrize("text", ["word " * 50, "x" * 300, "a b", ""])
def test_lines_fit_the_image(text: str) -> None:
    font = ImageFont.load_default(13)
    lines = plot.wrapped(text, font, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= plot.PICTURE for line in lines)
    if text == "a b":
        assert lines == ["a b"]
