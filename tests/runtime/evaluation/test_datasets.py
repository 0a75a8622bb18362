"""The data sets: samples, layouts, and the files and folders that they are read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.errors import DataSetError, UsageError
from fastvlm.models.tiny.scenes import draw_scene, scene_seeds
from fastvlm.runtime.evaluation.datasets import DataSet, Sample, held_out, open_data, tiny_questions

from .conftest import CHARTQA, DOCVQA, TEXTVQA, own


@pytest.mark.parametrize(("instruction", "prompt"), [("", "Why?"), ("In a word.", "Why?\nIn a word.")])
def test_prompt_is_the_question_with_its_instruction(instruction: str, prompt: str) -> None:
    sample = Sample("a", "x.png", "Why?", ("a",), "k")
    data = DataSet("made", "exact match", [sample], 1, lambda *_: 0.0, 8, instruction)
    assert data.prompt(sample) == prompt


Write = Callable[..., Path]


def test_textvqa_as_published(write_questions: Write) -> None:
    folder = write_questions({"TextVQA_0.5.1_val.json": TEXTVQA}, ["train_images/000ab.jpg", "train_images/001ab.jpg"])
    data = open_data(folder)
    samples = list(data.samples)
    assert (data.name, data.metric, data.count) == ("textvqa", "VQA accuracy", 4)
    assert samples[0].image == folder / "train_images" / "000ab.jpg"
    assert samples[0].id == "34602"
    assert data.prompt(samples[0]) == "what does sign 0 say?\nAnswer the question using a single word or phrase."
    assert data.score(samples[0], "Stop") == 1.0
    assert data.score(samples[0], "halt") == pytest.approx(0.6)


def test_docvqa_as_published(write_questions: Write) -> None:
    images = [f"documents/pybv{n}_81.png" for n in range(3)]
    data = open_data(write_questions({"val_v1.0_withQT.json": DOCVQA}, images) / "val_v1.0_withQT.json")
    samples = list(data.samples)
    assert (data.name, data.metric) == ("docvqa", "ANLS")
    assert [sample.kind for sample in samples] == ["layout", "handwritten", "handwritten"]
    assert data.score(samples[0], "1/8/92") == pytest.approx(5 / 6)


def test_docvqa_with_images_in_the_folder_of_later_archives(write_questions: Write) -> None:
    images = [f"spdocvqa_images/pybv{n}_81.png" for n in range(3)]
    folder = write_questions({"spdocvqa_qas/val_v1.0_withQT.json": DOCVQA}, images)
    samples = list(open_data(folder / "spdocvqa_qas").samples)
    assert samples[2].image == folder / "spdocvqa_images" / "pybv2_81.png"


def test_chartqa_reads_both_parts_of_a_split(write_questions: Write) -> None:
    folder = write_questions(
        {"test/test_human.json": CHARTQA, "test/test_augmented.json": CHARTQA[:2]}, ["test/png/41699051005347.png"]
    )
    data = open_data(folder / "test")
    samples = list(data.samples)
    assert (data.name, data.metric) == ("chartqa", "relaxed accuracy")
    assert [sample.kind for sample in samples] == ["augmented"] * 2 + ["human"] * 3
    assert data.score(samples[-1], "20.9") == 1.0
    assert open_data(folder / "test" / "test_human.json").count == 3


def test_own_questions_as_a_list_or_one_per_line(write_questions: Write) -> None:
    lines = "\n".join(json.dumps(entry) for entry in own(4)) + "\n\n"
    folder = write_questions({"lines.jsonl": lines}, ["0.png", "1.png"])
    data = open_data(folder)
    assert data.name == "questions"
    assert data.prompt(next(iter(data.samples))) == "What is thing 0?"
    assert [sample.answers for sample in data.samples][3] == ("thing 3", "it")
    (folder / "list.json").write_text(json.dumps([{"image": "0.png", "question": "How many?", "answer": 3}]))
    (sample,) = open_data(folder / "list.json").samples
    assert (sample.id, sample.kind, sample.answers) == ("0", "question", ("3",))


def test_tiny_questions_are_held_out_and_repeat() -> None:
    first, second = (list(tiny_questions(40).samples) for _ in range(2))
    assert len(first) == 40
    assert [(one.id, one.question, one.answers) for one in first] == [
        (one.id, one.question, one.answers) for one in second
    ]
    assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(first, second, strict=True))
    assert len({one.id for one in first}) == 40
    assert len({one.kind for one in first}) == 7
    own, trained = (draw_scene(scene_seeds(split, 1)[0]).image() for split in ("heldout", "train"))
    assert next(held_out()).image.tobytes() == own.tobytes() != trained.tobytes()


def test_tiny_scores_right_answers_1_and_others_0() -> None:
    data = tiny_questions(60)
    samples = list(data.samples)
    for sample in samples:
        assert data.score(sample, f" {sample.answers[0].upper()} ") == 1.0
        other = next(one for one in samples if one.kind == sample.kind and one.answers != sample.answers)
        assert data.score(sample, other.answers[0]) == 0.0


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
    monkeypatch.setattr("fastvlm.runtime.evaluation.datasets.MAX_VALUES", 20)
    with pytest.raises(DataSetError, match=r"mine\.json has more than 20 values\. Split it"):
        open_data(file)
    monkeypatch.setattr("fastvlm.runtime.evaluation.datasets.MAX_FILE_BYTES", 2**6)
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
