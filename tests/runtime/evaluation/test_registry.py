"""Opening question files: the layout is recognised, images are found, and the choice repeats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import DataSetError, UsageError
from fastvlm.runtime.evaluation.registry import open_data

from .conftest import TEXTVQA, own

Write = Callable[..., Path]


def test_images_are_found_in_the_folder_passed(write_questions: Write) -> None:
    folder = write_questions({"a/b/mine.json": own(2)}, ["pictures/0.png"])
    with pytest.raises(DataSetError, match=r"2 of 2 questions lack their image, such as 0\.png\. .* images=FOLDER"):
        open_data(folder / "a" / "b")
    (folder / "long.json").write_text(json.dumps([{"image": "x" * 5000, "question": "What?", "answer": "a"}]))
    with pytest.raises(DataSetError, match=r"long\.json: 1 of 1 questions lack their image, such as x{200}\. "):
        open_data(folder / "long.json")
    first, _ = open_data(folder / "a" / "b", images=folder / "pictures").samples
    assert first.image == folder / "pictures" / "0.png"


def test_larger_limits_choose_supersets_in_the_order_of_the_file(own_questions: Callable) -> None:
    file = own_questions(40)
    chosen = {limit: [sample.id for sample in open_data(file, limit).samples] for limit in (5, 20, 0)}
    assert [len(ids) for ids in chosen.values()] == [5, 20, 40]
    assert set(chosen[5]) < set(chosen[20])
    assert chosen[20] == [name for name in chosen[0] if name in chosen[20]], "in the file's order"
    assert chosen[20] != chosen[0][:20], "not only its beginning"
    assert open_data(file, 5).note == "5 of 40 questions, the same each time"
    assert open_data(file, 0).note == ""


def test_questions_about_an_image_are_consecutive(write_questions: Write) -> None:
    entries = [{**entry, "image": f"{n % 2}.png"} for n, entry in enumerate(own(6))]
    folder = write_questions({"mine.json": entries}, ["0.png", "1.png"])
    assert [sample.id for sample in open_data(folder).samples] == ["q0", "q2", "q4", "q1", "q3", "q5"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "neither 'tiny'|no file of questions"),
        ("[]", "no file of questions"),
        ('[{"image": "0.png", "question": "a", "answer": "b"},', "not valid JSON"),
        ([{"image": "0.png", "question": "a", "answer": "b"}, 3], "list of objects"),
        (
            [{"image": "0.png", "question": "a", "answer": "b"}, {"image": "0.png"}],
            "entry 2 is not a valid questions question: 'answer' is missing",
        ),
        ([{"image": "0.png", "question": 7, "answer": "b"}], "must be strings"),
        ([{"image": "0.png", "question": "a", "answer": []}], "has no answers"),
        ([{"image": "0.png", "question": "a", "answer": "b", "id": 1}] * 2, "two questions have the id '1'"),
        ({**TEXTVQA, "data": [{**TEXTVQA["data"][0], "answers": []}]}, "not a test split"),
    ],
)
def test_malformed_file_raises_an_error_of_one_line(write_questions: Write, content: object, problem: str) -> None:
    folder = write_questions({"mine.json": content}, ["0.png", "000ab.jpg"])
    with pytest.raises(DataSetError, match=problem) as caught:
        list(open_data(folder).samples)
    assert "\n" not in str(caught.value)


def test_file_with_too_many_values_or_bytes_is_refused(
    own_questions: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = own_questions(4)
    monkeypatch.setattr("fastvlm.runtime.evaluation.registry.MAX_VALUES", 20)
    with pytest.raises(DataSetError, match=r"mine\.json has more than 20 values\. Split it"):
        open_data(file)
    monkeypatch.setattr("fastvlm.runtime.evaluation.registry.MAX_FILE_BYTES", 2**6)
    with pytest.raises(DataSetError, match=r"mine\.json is larger than 0 MiB"):
        open_data(file)


def test_files_without_questions_are_ignored(write_questions: Write) -> None:
    files = {"mine.json": own(2), "ocr.json": {"words": [1]}, "broken.json": "{", "notes.txt": "x"}
    assert open_data(write_questions(files, ["0.png"])).count == 2


def test_folder_with_several_question_files_is_refused(write_questions: Write) -> None:
    folder = write_questions({"train.json": own(2), "val.json": own(4)}, ["0.png", "1.png"])
    with pytest.raises(DataSetError, match=r"2 files of questions \(train\.json, val\.json\)\. Pass one"):
        open_data(folder)
    assert open_data(folder / "val.json").count == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("tiny", 0), "limit"),
        (("tiny", -1), "limit"),
        (("x", 5, "vqa2"), r"task must be one of textvqa, chartqa, docvqa, questions \(got 'vqa2'\)"),
    ],
)
def test_invalid_limit_or_task_is_a_usage_error(arguments: tuple, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        open_data(*arguments)


def test_missing_questions_raise_a_data_set_error(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match="neither 'tiny' nor a file or folder"):
        open_data(tmp_path / "gone")
    with pytest.raises(DataSetError, match="no file of questions"):
        open_data(tmp_path)
