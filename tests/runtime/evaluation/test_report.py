"""The report of an evaluation: its rows, its JSON, and the comparison with an earlier one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import DataSetError
from fastvlm.runtime.evaluation.datasets import DataSet, Sample
from fastvlm.runtime.evaluation.report import ALL, SCHEMA, Answer, Evaluation, compare, read_evaluation
from fastvlm.runtime.evaluation.run import evaluate
from fastvlm.runtime.fastvlm import FastVLM


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


Own = Callable[[int], Path]


SHORT = {"max_tokens": 5}


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
        ("", "not valid JSON"),
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
