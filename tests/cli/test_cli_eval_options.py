"""`fastvlm eval`: what is refused before a model is loaded, and how the result is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastvlm.cli.eval import table
from fastvlm.cli.main import app
from fastvlm.models.errors import FastVLMError
from fastvlm.runtime.evaluation.report import Evaluation
from fastvlm.runtime.evaluation.samples import DataSet


@pytest.mark.parametrize("words", [("--task", "textvqa"), ("--images", "."), ("--data", "tiny", "--task", "textvqa")])
def test_options_of_a_file_need_one(words: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, ["eval", "no-folder", *words])
    assert found.exit_code == 2
    assert "add --data FILE" in found.stderr


@pytest.mark.parametrize(
    ("words", "problem"), [(("--max-tokens", "0"), "max_tokens"), (("--system", "\udc80"), "system prompt")]
)
def test_wrong_options_are_told_before_the_model_is_looked_at(words: tuple[str, ...], problem: str) -> None:
    found = CliRunner().invoke(app, ["eval", "no-folder", *words])
    assert isinstance(found.exception, FastVLMError)
    assert problem in str(found.exception)


def test_reports_of_others_are_told_of_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Notes")
    found = CliRunner().invoke(app, ["eval", "no-folder", "--json", str(tmp_path / "README.md")])
    assert "choose another name" in str(found.exception)


def test_table_names_the_folder_beside_the_questions() -> None:
    data = DataSet("tiny", "exact match", [], 0, lambda *_: 0.0, 8)
    found = Evaluation(data, (), {}, {"path": "my/model", "trained": False}, {}, (), 1.0)
    head = next(iter(table(found)))
    assert head == "tiny, 0 questions, exact match; asked of my/model; the weights are random"
