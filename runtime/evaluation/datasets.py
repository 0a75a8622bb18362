"""The known data sets: layouts of question files, and the built-in questions about drawn scenes.

To add a data set, write a reader of its entries and add a `Layout` to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...models.tiny.questions import NUMBERS, Question, is_right, questions_about
from ...models.tiny.scenes import COLOURS, MAX_SCENES, PLACES, SHAPES, draw_scene, scene_seeds
from .metrics import anls, exact_match, relaxed_accuracy, vqa_accuracy
from .samples import DataSet, Layout, Sample

QUESTIONS_STREAM = 2
"""The stream of a scene's random numbers that draws its questions. Streams 0 and 1 draw the layout and the paint."""


def read_textvqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads TextVQA (https://textvqa.org): `TextVQA_0.5.1_{train,val}.json` and `train_images/IMAGE_ID.jpg`.

    Each question has the answers of ten people. The answers of the test split are not published.
    """
    for entry in entries:
        yield Sample(
            id=str(entry["question_id"]),
            image=f"{entry['image_id']}.jpg",
            question=entry["question"],
            answers=tuple(entry.get("answers", ())),
            kind="text",
        )


def read_chartqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads ChartQA (https://github.com/vis-nlp/ChartQA): `test/test_{human,augmented}.json` and `test/png/NAME.png`.

    The part of the split (`human`, `augmented`) is only in the file's name, and entries have no ids.
    """
    part = file.stem.rpartition("_")[2]
    for index, entry in enumerate(entries):
        yield Sample(
            id=f"{part}-{index}",
            image=entry["imgname"],
            question=entry["query"],
            answers=(str(entry["label"]),),
            kind=part,
        )


def read_docvqa(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads DocVQA, task 1 (https://rrc.cvc.uab.es/?ch=17): `{train,val}_v1.0_withQT.json` and `documents/NAME.png`.

    A question's kind is the first of its types. In files without types every question has one kind.
    """
    for entry in entries:
        yield Sample(
            id=str(entry["questionId"]),
            image=entry["image"],
            question=entry["question"],
            answers=tuple(entry.get("answers", ())),
            kind=next(iter(entry.get("question_types") or ()), "document"),
        )


def read_own_questions(entries: list[dict[str, Any]], file: Path) -> Iterator[Sample]:
    """Reads a user's own questions: a JSON list, or an object per line, of `image`, `question` and `answer`.

    `answer` may be a list of right answers. `kind` and `id` are optional. Image paths are relative to the file.
    """
    for index, entry in enumerate(entries):
        answer = entry["answer"]
        yield Sample(
            id=str(entry.get("id", index)),
            image=entry["image"],
            question=entry["question"],
            answers=tuple(answer) if isinstance(answer, list) else (str(answer),),
            kind=str(entry.get("kind", "question")),
        )


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="textvqa",
            metric_name="VQA accuracy",
            metric=vqa_accuracy,
            keys=("question_id", "image_id", "question"),
            read=read_textvqa,
            image_folders=("train_images", "test_images", "images"),
        ),
        Layout(
            name="chartqa",
            metric_name="relaxed accuracy",
            metric=relaxed_accuracy,
            keys=("imgname", "query", "label"),
            read=read_chartqa,
            image_folders=("png", "images"),
            many_files=True,
        ),
        Layout(
            name="docvqa",
            metric_name="ANLS",
            metric=anls,
            keys=("questionId", "image", "question"),
            read=read_docvqa,
            image_folders=("documents", "spdocvqa_images", "images"),
            max_tokens=64,
        ),
        Layout(
            name="questions",
            metric_name="exact match",
            metric=exact_match,
            keys=("image", "question", "answer"),
            read=read_own_questions,
            instruction="",
            max_tokens=64,
        ),
    )
}
"""The layouts by name, in the order in which a file is tried."""


def tiny_questions(count: int) -> DataSet:
    """Returns the first `count` questions about the held-out scenes of `tiny`, up to seven per scene.

    The scenes are drawn while they are asked about.
    """
    return DataSet(
        name="tiny",
        metric="exact; descriptions by what they name",
        samples=islice(held_out(), count),
        count=count,
        score=score_tiny,
        max_tokens=96,
        categories={"colour": tuple(COLOURS), "shape": SHAPES, "count": NUMBERS, "where": PLACES},
    )


def held_out() -> Iterator[Sample]:
    """Draws the held-out scenes in order and yields the questions about each."""
    for number, seed in enumerate(scene_seeds("heldout", MAX_SCENES)):
        scene = draw_scene(seed)
        image = scene.image()
        draw = np.random.Generator(np.random.PCG64([seed, QUESTIONS_STREAM]))
        for question in questions_about(scene, draw):
            yield Sample(f"{number}-{question.kind}", image, question.text, (question.answer,), question.kind)


def score_tiny(sample: Sample, prediction: str) -> float:
    """Returns 1.0 for a right answer about a drawn scene, else 0.0."""
    return float(is_right(Question(sample.kind, sample.question, sample.answers[0]), prediction))
