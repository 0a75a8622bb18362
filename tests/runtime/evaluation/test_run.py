"""The evaluation of a folder, with a real decoder and real files: its rows, its JSON, and two reports compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastvlm.models._mlx import mx
from fastvlm.models.errors import DataSetError, WeightsError
from fastvlm.runtime.evaluation.datasets import DataSet, Sample, open_data
from fastvlm.runtime.evaluation.run import (
    ALL,
    GIVE_UP_AFTER,
    SCHEMA,
    Answer,
    Evaluation,
    EvaluationRun,
    Question,
    compare,
    evaluate,
    read_evaluation,
    timings_of,
)
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.request import prepare

Own = Callable[[int], Path]
SHORT = {"max_tokens": 5}


def test_report_has_the_keys_of_its_schema(vlm: FastVLM, own_questions: Callable) -> None:
    found = evaluate(vlm, own_questions(4), max_tokens=3, system="Be brief.")
    report = json.loads(json.dumps(found.as_dict()))
    names = "schema complete questions planned data options folder environment notes accuracy ttft_ms seconds"
    assert list(report) == [*names.split(), "wrong", "scores"]
    assert report["options"] == {"system": "Be brief.", "max_tokens": 3, "instruction": "", "greedy": True}
    assert report["environment"]["vision"] == "fake"
    assert report["accuracy"]["all"] == dataclasses.asdict(found.rows[ALL])
    assert report["scores"]["q0"]["kind"] == "kind 0"
    assert report["wrong"][0]["expected"] == ["thing 0", "it"]
    assert report["folder"]["trained"] is True
    assert sorted(report["folder"]) == ["path", "recipe", "source", "tools", "trained"]


def test_right_answers_are_counted_by_kind(vlm: FastVLM, own_questions: Own) -> None:
    """The model's own answers become the expected ones of three questions."""
    file = own_questions(6)
    said = [answer.text for answer in evaluate(vlm, file, **SHORT).answers]
    entries = json.loads(file.read_text())
    for index in (0, 1, 2):
        entries[index]["answer"] = ["something else", said[index].upper()]
    file.write_text(json.dumps(entries))
    found = evaluate(vlm, file, **SHORT)
    assert {kind: (row.right, row.n) for kind, row in found.rows.items()} == {
        "kind 0": (2, 3),
        "kind 1": (1, 3),
        ALL: (3, 6),
    }
    assert found.accuracy == 0.5
    assert [entry["id"] for entry in found.as_dict()["wrong"]] == ["q3", "q4", "q5"]


def evaluation_of(scores: list[float], digest: str = "d", kinds: int = 1) -> Evaluation:
    samples = [Sample(f"{n}", "x.png", "Why?", ("a",), f"kind {n % kinds}") for n in range(len(scores))]
    data = DataSet("made", "exact match", samples, len(samples), lambda *_: 0.0, 8)
    answers = tuple(Answer(one, "b", score, digest, None) for one, score in zip(samples, scores, strict=True))
    return Evaluation(data, answers, {}, {"path": "old folder", "trained": True}, {}, (), 1.0)


def test_significance_depends_on_paired_counts() -> None:
    """Both runs are one point worse, with 10 changed questions in one and 210 in the other."""
    old = evaluation_of([1.0] * 800 + [0.0] * 200)
    few = compare(evaluation_of([0.0] * 10 + [1.0] * 790 + [0.0] * 200), old.as_dict()).changes[ALL]
    many = compare(evaluation_of([0.0] * 110 + [1.0] * 690 + [1.0] * 100 + [0.0] * 100), old.as_dict()).changes[ALL]
    assert few.points == pytest.approx(-1.0)
    assert many.points == pytest.approx(-1.0)
    assert ((few.better, few.worse), (many.better, many.worse)) == ((0, 10), (100, 110))
    assert few.beyond_noise
    assert few.p == pytest.approx(2 / 2**10)
    assert not many.beyond_noise


def test_only_questions_about_the_same_image_are_compared() -> None:
    old = evaluation_of([1.0] * 4).as_dict()
    old["scores"]["1"]["digest"] = "another image"
    del old["scores"]["3"]
    found = compare(evaluation_of([0.0, 0.0, 1.0, 0.0]), old)
    assert (found.left_out, found.changes[ALL].n, found.changes[ALL].worse) == (2, 2, 1)
    nothing = compare(evaluation_of([1.0], digest="e"), old)
    assert (nothing.changes, nothing.left_out) == ({}, 1)


def test_each_kind_is_compared_with_partial_credit() -> None:
    found = compare(
        evaluation_of([0.5, 1.0, 0.5, 1.0], kinds=2), evaluation_of([0.3, 1.0, 0.6, 0.0], kinds=2).as_dict()
    )
    assert list(found.changes) == ["kind 0", "kind 1", ALL]
    assert (found.changes["kind 0"].better, found.changes["kind 0"].worse) == (1, 1)
    assert found.changes["kind 0"].points == pytest.approx(5.0)
    assert json.loads(json.dumps(found.as_dict()))["changes"]["all"]["points"] == pytest.approx(27.5)


def test_report_compared_with_itself_has_no_change(vlm: FastVLM, own_questions: Callable, tmp_path: Path) -> None:
    found = evaluate(vlm, own_questions(4), max_tokens=3)
    (tmp_path / "old.json").write_text(json.dumps(found.as_dict()))
    comparison = compare(found, read_evaluation(tmp_path / "old.json"))
    assert comparison.left_out == 0
    assert comparison.old_folder == str(vlm.folder.path)
    assert {(change.better, change.worse, change.p) for change in comparison.changes.values()} == {(0, 0, 1.0)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "an empty file"),
        ("{}", "got None"),
        (json.dumps({"schema": SCHEMA}), "no valid scores"),
        (json.dumps({"schema": SCHEMA, "scores": {"1": {"score": "1"}}}), "no valid scores"),
        (json.dumps({"schema": "fastvlm.evaluation/2", "scores": {}}), "evaluation/2"),
    ],
)
def test_file_that_is_not_a_report_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "old.json").write_text(content)
    with pytest.raises(DataSetError, match=problem):
        read_evaluation(tmp_path / "old.json")


def test_answers_are_those_of_generate(vlm: FastVLM, own_questions: Own) -> None:
    found = evaluate(vlm, own_questions(4), **SHORT)
    samples = list(open_data(own_questions(4)).samples)
    vlm.engine.clear_caches()
    expected = [vlm.generate(sample.image, sample.question, **SHORT).text for sample in samples]
    assert [answer.text for answer in found.answers] == expected
    assert [answer.sample.id for answer in found.answers] == ["q0", "q1", "q2", "q3"]
    assert found.complete
    assert found.seconds > 0


def test_later_images_are_prepared_before_an_answer_ends(vlm: FastVLM, own_questions: Own) -> None:
    data = open_data(own_questions(4))
    taken: list[str] = []

    def samples() -> Iterator[Sample]:
        for sample in data.samples:
            taken.append(sample.id)
            yield sample

    answers = iter(EvaluationRun(vlm, dataclasses.replace(data, samples=samples()), max_tokens=1))
    assert next(answers).sample.id == "q0"
    assert taken == ["q0", "q1", "q2", "q3"]


def test_ttft_has_the_whole_time_of_an_image_encoded_ahead(vlm: FastVLM, own_questions: Own) -> None:
    sample = next(iter(open_data(own_questions(1)).samples))
    request = vlm.engine.prepare(prepare(sample.image, "Why?", max_tokens=1))
    found = vlm.engine.stream(request.request).read()
    request.submitted.append(SimpleNamespace(predict_ms=12_345.0))
    assert timings_of(Question(sample, "", request), found).encode_ms == 12_345.0
    assert timings_of(Question(sample), found) == found.timings


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
