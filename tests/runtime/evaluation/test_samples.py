"""Samples and data sets."""

from __future__ import annotations

import pytest

from fastvlm.runtime.evaluation.samples import DataSet, Sample


@pytest.mark.parametrize(("instruction", "prompt"), [("", "Why?"), ("In a word.", "Why?\nIn a word.")])
def test_prompt_is_the_question_with_its_instruction(instruction: str, prompt: str) -> None:
    sample = Sample("a", "x.png", "Why?", ("a",), "k")
    data = DataSet("made", "exact match", [sample], 1, lambda *_: 0.0, 8, instruction)
    assert data.prompt(sample) == prompt
