"""Question files in the layouts of published data sets, small images, and evaluations without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.runtime.evaluation.datasets import DataSet, Sample
from fastvlm.runtime.evaluation.run import Answer, Evaluation

TEN = ["stop"] * 4 + ["halt"] * 2 + ["go", "red", "sign", "a stop"]

TEXTVQA = {
    "dataset_type": "val",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": f"what does sign {n} say?",
            "image_id": f"00{n // 2}ab",
            "image_classes": ["Sign"],
            "flickr_original_url": "https://example.invalid/x.jpg",
            "image_width": 8,
            "image_height": 6,
            "answers": TEN,
            "question_tokens": ["what"],
            "question_id": 34602 + n,
            "set_name": "val",
        }
        for n in range(4)
    ],
}
DOCVQA = {
    "dataset_name": "SP-DocVQA",
    "dataset_split": "val",
    "dataset_version": "1.0",
    "data": [
        {
            "questionId": 49153 + n,
            "question": "What is the date?",
            "question_types": ["handwritten", "form"] if n else ["layout"],
            "image": f"documents/pybv{n}_81.png",
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81",
            "answers": ["1/8/93", "1/8/1993"],
            "data_split": "val",
        }
        for n in range(3)
    ],
}
CHARTQA = [{"imgname": "41699051005347.png", "query": f"How many bars {n}?", "label": str(10 * n)} for n in range(3)]


@pytest.fixture
def write_questions(tmp_path: Path) -> Callable[..., Path]:
    """`write_questions({file: JSON value}, [image, ...])` writes them into a folder, and returns it."""

    def write(files: dict[str, Any], images: list[str] = ()) -> Path:  # type: ignore[assignment]
        for name, value in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        for index, name in enumerate(images):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (40 * index, 200, 30)).save(path)
        return tmp_path

    return write


def own(count: int, kinds: int = 2) -> list[dict[str, Any]]:
    """Returns questions in the toolkit's own layout, two per image."""
    return [
        {
            "image": f"{n // 2}.png",
            "question": f"What is thing {n}?",
            "answer": [f"thing {n}", "it"],
            "kind": f"kind {n % kinds}",
            "id": f"q{n}",
        }
        for n in range(count)
    ]


@pytest.fixture
def own_questions(write_questions: Callable[..., Path]) -> Callable[[int], Path]:
    """`own_questions(count)`: a file of questions with its images."""
    return lambda count: (
        write_questions({"mine.json": own(count)}, [f"{n}.png" for n in range(-(-count // 2))]) / "mine.json"
    )


def evaluation_of(texts: list[tuple[str, str]], categories: dict | None = None) -> Evaluation:
    """Returns an evaluation of (expected, given) answers of two kinds in turn, each about its own image."""
    samples = [
        Sample(f"{n}", Image.new("RGB", (20 + n, 30), (n, 90, 200)), f"What is {n}?", (expected,), f"kind {n % 2}")
        for n, (expected, _) in enumerate(texts)
    ]
    answers = tuple(
        Answer(sample, given, float(given == sample.answers[0]), "d", None)
        for sample, (_, given) in zip(samples, texts, strict=True)
    )
    data = DataSet("made", "exact match", samples, len(samples), lambda *_: 0.0, 8, categories=categories or {})
    return Evaluation(
        data, answers, {}, {"path": "a $\\frac$ \x1b folder", "trained": False, "recipe": None}, {}, (), 1.0
    )
