"""`fastvlm eval` as a user types it, on an exported `random:tiny`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastvlm.cli.eval import table
from fastvlm.cli.main import app
from fastvlm.models.errors import FastVLMError
from fastvlm.runtime.evaluation.datasets import DataSet
from fastvlm.runtime.evaluation.run import Evaluation

COMMAND = [sys.executable, "-m", "fastvlm.cli.main"]
SHORT = ("--limit", 14, "--max-tokens", 4)


@pytest.fixture(scope="module")
def evaluated(fastvlm: Callable, model: Path) -> subprocess.CompletedProcess:
    """One evaluation with everything that can be written."""
    words = ("--report", "r.json", "--plot", "p.png", "--samples", "s.png")
    return fastvlm("eval", model, *SHORT, *words, cwd=model.parent)


def test_table_goes_to_stdout_and_progress_to_stderr(evaluated: subprocess.CompletedProcess) -> None:
    assert evaluated.returncode == 0, evaluated.stderr
    lines = evaluated.stdout.splitlines()
    assert lines[0].startswith("tiny, 14 questions, exact")
    assert lines[0].endswith("the weights are random")
    assert [line.split()[0] for line in lines[2:10]] == [
        *("colour", "count", "describe", "shape", "text", "where", "yes-no"),
        "all",
    ]
    assert lines[9].split()[1:3] == ["14", "0.0%"]
    assert "TTFT" in lines[10]
    assert "14 of 14 questions" in evaluated.stderr
    assert "note: random weights: the text means nothing" in evaluated.stderr


def test_report_and_pictures_are_written(evaluated: subprocess.CompletedProcess, model: Path) -> None:
    report = json.loads((model.parent / "r.json").read_text())
    assert report["schema"] == "fastvlm.evaluation/1"
    assert (report["complete"], report["questions"]) == (True, 14)
    assert len(report["wrong"]) == len(report["scores"]) == 14
    assert report["folder"]["source"]["name"] == "random:tiny"
    assert report["folder"]["recipe"]["quant"] == "int8"
    for name in ("p.png", "s.png"):
        assert Image.open(model.parent / name).width > 400


def test_compared_with_itself_nothing_changed(
    here: Callable, evaluated: subprocess.CompletedProcess, model: Path
) -> None:
    done = here("eval", model, *SHORT, "--verify-hashes", "--compare", "r.json", "--json", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["comparison"]["left_out"] == 0
    assert report["comparison"]["changes"]["all"]["points"] == 0
    earlier = json.loads((model.parent / "r.json").read_text())
    assert report["scores"] == earlier["scores"]
    assert report["wrong"] == earlier["wrong"]


def test_own_questions_are_compared(here: Callable, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "a.png")
    entries = [{"image": "a.png", "question": f"Which {n}?", "answer": "none", "kind": "\x1b[2Jbad"} for n in range(3)]
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    words = ("eval", model, "--data", "mine.json", "--max-tokens", 2)
    assert here(*words, "--report", "old.json", cwd=tmp_path).returncode == 0
    done = here(*words, "--compare", "old.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "question by question" in done.stdout
    assert done.stdout.count("within noise") == 2


def test_ctrl_c_shows_the_answers_so_far(model: Path, tmp_path: Path) -> None:
    words = ("eval", model, "--limit", 5000, "--max-tokens", 40, "--report", "r.json")
    with subprocess.Popen(
        [*COMMAND, *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if "1 of 5,000 questions" in line:
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "error: interrupted"
    assert "(partial: " in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["complete"] is False
    assert 0 < report["questions"] < 5000


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--data", "gone.json"), "neither 'tiny' nor a file"),
        (("--compare", "gone.json"), "gone.json"),
        (("--plot", "p.tiff"), ".png"),
        (("--report", "no/folder/r.json"), "cannot be written"),
    ],
)
def test_bad_requests_are_one_line_before_loading(here: Callable, tmp_path: Path, words: tuple, problem: str) -> None:
    done = here("eval", "no-folder-either", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert problem in line


@pytest.mark.parametrize("words", [("--task", "textvqa"), ("--images", "."), ("--data", "tiny", "--task", "textvqa")])
def test_options_of_a_data_set_need_one(words: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, ["eval", "no-folder", *words])
    assert found.exit_code == 2
    assert "add --data FILE" in found.stderr


@pytest.mark.parametrize(
    ("words", "problem"), [(("--max-tokens", "0"), "max_tokens"), (("--system", "\udc80"), "system prompt")]
)
def test_wrong_options_are_reported_before_loading(words: tuple[str, ...], problem: str) -> None:
    found = CliRunner().invoke(app, ["eval", "no-folder", *words])
    assert isinstance(found.exception, FastVLMError)
    assert problem in str(found.exception)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Notes")
    found = CliRunner().invoke(app, ["eval", "no-folder", "--report", str(tmp_path / "README.md")])
    assert "Choose another name" in str(found.exception)


def test_table_has_the_folder_and_the_data_set() -> None:
    data = DataSet("tiny", "exact match", [], 0, lambda *_: 0.0, 8)
    found = Evaluation(data, (), {}, {"path": "my/model", "trained": False}, {}, (), 1.0)
    head = next(iter(table(found)))
    assert head == "tiny, 0 questions, exact match; asked of my/model; the weights are random"
