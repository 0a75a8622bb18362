"""Evaluation runs with a real decoder, real files and the features of a fake encoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.errors import WeightsError
from fastvlm.runtime.evaluation.datasets import DataSet, Sample, open_data
from fastvlm.runtime.evaluation.report import ALL
from fastvlm.runtime.evaluation.run import GIVE_UP_AFTER, EvaluationRun, evaluate
from fastvlm.runtime.fastvlm import FastVLM

Own = Callable[[int], Path]
SHORT = {"max_tokens": 5}


def test_answers_are_those_of_generate(vlm: FastVLM, own_questions: Own) -> None:
    found = evaluate(vlm, own_questions(4), **SHORT)
    samples = list(open_data(own_questions(4)).samples)
    vlm.engine.clear_caches()
    expected = [vlm.generate(sample.image, sample.question, **SHORT).text for sample in samples]
    assert [answer.text for answer in found.answers] == expected
    assert [answer.sample.id for answer in found.answers] == ["q0", "q1", "q2", "q3"]
    assert found.complete
    assert found.seconds > 0


def test_every_image_is_encoded_once(vlm: FastVLM, own_questions: Own) -> None:
    found = evaluate(vlm, own_questions(6), **SHORT)
    assert len(vlm.engine.encoder.calls) == 3
    assert [answer.timings.cached_images for answer in found.answers] == [0, 1] * 3
    assert 1 <= len(found.ttft_ms) <= 3  # the process's first answer is cold


def test_two_runs_differ_only_in_time(vlm: FastVLM, own_questions: Own) -> None:
    first, second = (evaluate(vlm, own_questions(4), **SHORT).as_dict() for _ in range(2))
    for report in (first, second):
        report.pop("seconds")
        report.pop("ttft_ms")
    assert first == second


def test_instruction_and_system_prompt_reach_the_model(vlm: FastVLM, own_questions: Own) -> None:
    data = open_data(own_questions(2))
    plain, instructed, ruled = (
        EvaluationRun(vlm, data, system=system, max_tokens=1)
        for data, system in [
            (data, None),
            (dataclasses.replace(data, instruction="Answer with a word."), None),
            (data, "Be very brief indeed, please."),
        ]
    )
    lengths = [[answer.timings.prompt_tokens for answer in run] for run in (plain, instructed, ruled)]
    assert lengths[1][0] > lengths[0][0]
    assert lengths[2] != lengths[0]


def test_failed_question_counts_as_wrong(vlm: FastVLM, own_questions: Own) -> None:
    file = own_questions(4)
    (file.parent / "1.png").write_bytes(b"no image")
    found = evaluate(vlm, file, **SHORT)
    assert found.complete
    assert [answer.text is None for answer in found.answers] == [False, False, True, True]
    assert "1.png" in found.failures[0].error
    assert found.rows[ALL].n == 4
    json.dumps(found.as_dict())


def test_long_questions_and_image_marks_do_not_end_the_run(write_folder, open_vlm, own_questions: Own) -> None:
    vlm = open_vlm(write_folder(tokenizer_model_max_length=80))
    file = own_questions(3)
    entries = json.loads(file.read_text())
    entries[0]["question"] = "What? " * 100
    entries[2]["question"] = "<image><image> Which?"
    file.write_text(json.dumps(entries))
    found = evaluate(vlm, file, **SHORT)
    assert [bool(answer.error) for answer in found.answers] == [True, False, True]
    assert "context" in found.answers[0].error


@pytest.mark.parametrize("count", [3, 30])
def test_model_that_cannot_answer_raises_an_error(vlm: FastVLM, own_questions: Own, count: int) -> None:
    vlm.engine.language.language_model.model.norm.weight = mx.full((128,), np.nan)
    run = EvaluationRun(vlm, open_data(own_questions(count)))
    with pytest.raises(WeightsError, match="not finite"):
        list(run)
    assert len(run.evaluation.answers) == min(count, GIVE_UP_AFTER)


def test_answers_before_an_interruption_are_kept(vlm: FastVLM, own_questions: Own) -> None:
    run = EvaluationRun(vlm, open_data(own_questions(6)), max_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        for answer in run:
            if answer.sample.id == "q2":
                raise KeyboardInterrupt
    found = run.evaluation
    assert not found.complete
    assert found.rows[ALL].n == 3
    report = found.as_dict()
    assert (report["complete"], report["questions"], report["planned"]) == (False, 3, 6)


def test_digest_depends_on_the_image_and_the_answers(vlm: FastVLM) -> None:
    def digest_of(**changes: object) -> str:
        picture = np.full((8, 8, 3), changes.pop("value", 5), np.uint8)
        sample = dataclasses.replace(Sample("a", picture, "Why?", ("x",), "k"), **changes)
        data = DataSet("d", "m", [sample], 1, lambda *_: 1.0, 1)
        (answer,) = EvaluationRun(vlm, data)
        return answer.digest

    usual = digest_of()
    assert digest_of(id="b", kind="other") == usual
    assert len({usual, digest_of(value=6), digest_of(question="How?"), digest_of(answers=("y",))}) == 4
