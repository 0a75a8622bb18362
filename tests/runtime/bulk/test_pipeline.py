"""The pipeline: rows in the order of images, the answers of `generate`, and duplicates that are encoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm.models.errors import PackageError, PromptError, UsageError
from fastvlm.runtime.bulk import pipeline
from fastvlm.runtime.bulk.pipeline import Captioner, Row
from fastvlm.runtime.bulk.sources import Item, Source
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.tests.runtime.bulk.conftest import BROKEN, NAMES

OPTIONS: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def rows(vlm: FastVLM, pictures: Path) -> Callable[..., list[Row]]:
    """A function that returns the rows of the images."""

    def run(*prompts: str, batch_size: int = 2, workers: int = 2, **options: Any) -> list[Row]:
        captioner = Captioner(vlm, prompts, {**OPTIONS, **options}, batch_size=batch_size, workers=workers)
        return list(captioner.rows(Source([pictures])))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (2, 3), (8, 2)])
def test_rows_have_the_answers_of_generate(
    rows: Callable[..., list[Row]], vlm: FastVLM, pictures: Path, batch_size: int, workers: int
) -> None:
    prompts = ("Describe it.", "<image> What color?")
    found = rows(*prompts, batch_size=batch_size, workers=workers, system="Be brief.")
    assert [row.key for row in found] == NAMES
    for row in found:
        if row.key == BROKEN:
            assert BROKEN in row.entry["error"]
            continue
        for prompt, entry in zip(prompts, row.entry["answers"], strict=True):
            alone = vlm.generate(pictures / row.key, prompt, system="Be brief.", **OPTIONS)
            assert (entry["text"], entry["tokens"]) == (alone.text, 5)
            assert entry["timings"]["ttft_ms"] > 0


def test_image_is_encoded_once_for_all_prompts(rows: Callable[..., list[Row]], vlm: FastVLM) -> None:
    rows("a", "b", "c")
    assert len(vlm.engine.encoder.calls) == 5


def test_duplicate_gets_the_earlier_answer(
    rows: Callable[..., list[Row]], vlm: FastVLM, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(9):
        (pictures / f"z{n}.png").write_bytes((pictures / "a.PNG").read_bytes())
    found = {row.key: row for row in rows("a", batch_size=1, workers=1)}
    last = found["z8.png"]
    assert last.repeated and not found["a.PNG"].repeated
    assert last.entry == {key: found["a.PNG"].entry[key] for key in ("text", "tokens", "finish_reason")}
    assert len(vlm.engine.encoder.calls) == 5
    assert not any(row.repeated for row in rows("a", temperature=1.0)), "samples differ"
    monkeypatch.setattr(pipeline, "MAX_REMEMBERED", 1)
    assert not {row.key: row for row in rows("a", batch_size=1, workers=1)}["z0.png"].repeated


def test_image_that_cannot_be_encoded_gets_an_error(rows: Callable[..., list[Row]], vlm: FastVLM) -> None:
    encode, calls = vlm.engine.encoder.encode, iter(range(99))

    def failing(pixel_values: np.ndarray) -> np.ndarray:
        if next(calls) == 1:
            raise PackageError("not finite")
        return encode(pixel_values)

    vlm.engine.encoder.encode = failing  # type: ignore[method-assign]
    errors = {row.key: row.error for row in rows("a") if row.error}
    assert errors["b.png"] == "not finite"
    assert set(errors) == {"b.png", BROKEN}


def test_error_of_the_prompt_ends_the_run(rows: Callable[..., list[Row]], vlm: FastVLM) -> None:
    with pytest.raises(PromptError, match="<image>: 2, images: 1"):
        rows("<image> <image>")
    with pytest.raises(UsageError, match="prompts must have at least one"):
        Captioner(vlm, [])
    with pytest.raises(UsageError, match="max_tokens"):
        Captioner(vlm, "a", {"max_tokens": 0})


def test_few_images_are_taken_ahead_and_threads_end(vlm: FastVLM, pictures: Path) -> None:
    taken = 0

    def endless() -> Iterator[Item]:
        nonlocal taken
        while True:
            taken += 1
            yield Item(str(taken), lambda n=taken: f"not an image {n}".encode())  # type: ignore[misc]

    found = Captioner(vlm, "a", OPTIONS, batch_size=2, workers=2).rows(endless())
    errors = [next(found).error for _ in range(100)]
    assert errors[6] is not None and errors[6].startswith("7 is a text")
    assert taken <= 100 + 2 * 2 * 16 + 2 + 2 * 2
    found.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastvlm-ahead")]


def test_structured_answer_is_in_the_entry(rows: Callable[..., list[Row]]) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    found = rows("a", schema=schema, max_tokens=40, ignore_eos=False)
    assert [row.entry["answer"] for row in found if not row.error] == 5 * [{"n": 7}]
