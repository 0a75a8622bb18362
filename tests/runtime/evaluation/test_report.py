"""The report of an evaluation: its rows and its JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from fastvlm.runtime.evaluation.report import ALL
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
