"""Data sets: question files as published, and the questions about drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastvlm.models.tiny.scenes import draw_scene, scene_seeds
from fastvlm.runtime.evaluation.datasets import held_out, tiny_questions
from fastvlm.runtime.evaluation.registry import open_data

from .conftest import CHARTQA, DOCVQA, TEXTVQA, own

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
