"""The evaluation of a folder: a run over the questions of a data set."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...models.errors import FastVLMError
from ..fastvlm import FastVLM, load
from ..request import Request, prepare
from .datasets import DEFAULT_LIMIT, DataSet, Sample, open_data
from .report import Answer, Evaluation, environment, folder_facts

GIVE_UP_AFTER = 8
"""The number of first questions that may all fail before the run ends. Then the folder is at fault, not a question."""


def evaluate(
    folder: str | Path | FastVLM,
    data: str | Path = "tiny",
    *,
    limit: int = DEFAULT_LIMIT,
    task: str | None = None,
    images: str | Path | None = None,
    backend: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    on_answer: Callable[[Answer], None] | None = None,
) -> Evaluation:
    """Measures the accuracy of the model in a folder. Decoding is greedy, so results repeat on one machine.

    `data`, `limit`, `task` and `images` are those of `datasets.open_data`. `backend` is an argument of `load`, and
    `system` and `max_tokens` are arguments of `prepare`. `on_answer` is called with each answer.

    Raises:
        UsageError, DataSetError: the questions cannot be opened, as in `datasets.open_data`.
        FastVLMError: the folder cannot be loaded, or answers none of the first questions.
    """
    questions = open_data(data, limit, task, None if images is None else Path(images))
    model = folder if isinstance(folder, FastVLM) else load(folder, backend)
    run = EvaluationRun(model, questions, system, max_tokens)
    for answer in run:
        if on_answer:
            on_answer(answer)
    return run.evaluation


class EvaluationRun:
    """An iterator that asks one question after the other. `evaluation` has the results so far."""

    def __init__(self, model: FastVLM, data: DataSet, system: str | None = None, max_tokens: int | None = None) -> None:
        self._model = model
        self._data = data
        tokens = data.max_tokens if max_tokens is None else max_tokens
        self._options: dict[str, Any] = {"system": system, "max_tokens": tokens}
        self._answers: list[Answer] = []
        self._seconds = 0.0

    def __iter__(self) -> Iterator[Answer]:
        """Yields each answer. Raises FastVLMError if none of the first questions can be answered."""
        failed: FastVLMError | None = None
        for sample in self._data.samples:
            begin = time.perf_counter()
            try:
                answer = self._answer(sample)
            except FastVLMError as reason:
                if failed is None and not self._answers:
                    failed = reason
                answer = Answer(sample, None, 0.0, "", None, str(reason))
            self._answers.append(answer)
            self._seconds += time.perf_counter() - begin
            if failed and len(self._answers) == GIVE_UP_AFTER and all(one.error for one in self._answers):
                raise failed
            yield answer
        if failed and all(one.error for one in self._answers):
            raise failed

    @property
    def evaluation(self) -> Evaluation:
        """The result over the questions asked so far."""
        return Evaluation(
            data=self._data,
            answers=tuple(self._answers),
            options={**self._options, "instruction": self._data.instruction, "greedy": True},
            folder=folder_facts(self._model.folder),
            environment=environment(self._model),
            notes=self._model.notes,
            seconds=self._seconds,
        )

    def _answer(self, sample: Sample) -> Answer:
        request = prepare(sample.image, self._data.prompt(sample), **self._options)
        found = self._model.engine.stream(request).read()
        score = self._data.score(sample, found.text)
        return Answer(sample, found.text, score, digest(sample, request), found.timings)


def digest(sample: Sample, request: Request) -> str:
    """Returns a hash of pixels, question and answers, which must agree for two scores to be compared."""
    state = hashlib.blake2b(digest_size=8)
    for image in request.images:
        state.update(repr(image.size).encode())
        state.update(image.tobytes())
    state.update(repr((sample.question, sample.answers)).encode())
    return state.hexdigest()
