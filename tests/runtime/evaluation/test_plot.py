"""The plot of an evaluation: confusion counts, and the axes that are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm.models.errors import MachineError
from fastvlm.runtime.evaluation import plot
from fastvlm.runtime.evaluation.plot import mixups, word_in

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
