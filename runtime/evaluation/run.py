"""The evaluation of a folder: a run over the questions of a data set, its report, and the comparison of two reports.

`fastvlm eval --report` writes one object (`schema` "fastvlm.evaluation/1"; fields may be added without a new number):

    schema       "fastvlm.evaluation/1"
    complete     false if the run was interrupted
    questions    number asked so far, of `planned`
    data         name, metric and note of the data set
    options      greedy, max_tokens, system, instruction
    folder       path, trained, and from its manifest: source, recipe, tools
    environment  versions, machine, vision backend, decoder device
    notes        remarks for the user about this folder
    accuracy     {"all": row, kind: row ...}, where a row has n, right, accuracy, low and high (95 % interval)
    ttft_ms      {"median", "n"} over answers that encoded an image, or null without one
    seconds      time of the whole run
    wrong        every answer with a score below 1: id, kind, question, expected, answer, score, error
    scores       id -> {"kind", "score", "digest"}, with a digest of pixels, question and expected answers
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..._version import __version__
from ...models.errors import DataSetError, FastVLMError, ModelFolderError
from ...models.files import read_json_object
from ...models.folder_layout import MANIFEST_NAME
from ..bulk.answers import Asked, answers
from ..engine import PreparedRequest
from ..fastvlm import FastVLM, load
from ..folder import ModelFolder
from ..generate import Generation
from ..request import Request, prepare
from ..timings import Timings
from .datasets import DEFAULT_LIMIT, DataSet, Sample, open_data
from .scoring import sign_test, wilson_interval

SCHEMA = "fastvlm.evaluation/1"
ALL = "all"
"""The name of the row that counts all questions."""
MAX_PATH = 60
"""The number of characters from the end of a folder's path that a title shows."""

GIVE_UP_AFTER = 8
"""The number of first questions that may all fail before the run ends. Then the folder is at fault, not a question."""


@dataclass(frozen=True)
class Answer:
    """One question with the model's answer."""

    sample: Sample
    text: str | None
    """The answer, or None if the question failed. `error` then has the reason."""
    score: float
    digest: str
    timings: Timings | None
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry that a report lists under `wrong`."""
        sample = self.sample
        return {
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.question,
            "expected": list(sample.answers),
            "answer": self.text,
            "score": self.score,
            "error": self.error,
        }


@dataclass(frozen=True)
class Row:
    """The scores of the questions of one kind."""

    n: int
    right: int
    """The number of answers with the full score."""
    accuracy: float
    """The mean score, 0 to 1."""
    low: float
    high: float
    """The 95 % interval of the accuracy."""


def row_of(scores: Iterable[float]) -> Row:
    """Returns the row for the scores of some questions."""
    scores = list(scores)
    accuracy = fmean(scores) if scores else 0.0
    return Row(len(scores), sum(score == 1 for score in scores), accuracy, *wilson_interval(accuracy, len(scores)))


@dataclass(frozen=True)
class Evaluation:
    """The answers to the questions of a data set. An interrupted run has fewer than planned."""

    data: DataSet
    answers: tuple[Answer, ...]
    options: dict[str, Any]
    folder: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """True if every planned question was asked."""
        return len(self.answers) == self.data.count

    @property
    def accuracy(self) -> float:
        """The mean score of all questions, 0 to 1."""
        return self.rows[ALL].accuracy

    @property
    def title(self) -> str:
        """The folder, scheme, data set and number of questions, as one line of printable characters."""
        recipe: Any = self.folder.get("recipe")
        scheme = f", {recipe['quant']}" if isinstance(recipe, dict) and isinstance(recipe.get("quant"), str) else ""
        weights = "" if self.folder["trained"] else ", random weights"
        partial = "" if self.complete else f" (partial, of {self.data.count:,})"
        model = f"{str(self.folder['path'])[-MAX_PATH:]}{scheme}{weights}"
        line = f"{model}: {self.data.name}, {len(self.answers):,} questions{partial}"
        return "".join(c for c in line if c.isprintable())

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The rows by kind, sorted by name, with `all` last."""
        kinds = sorted({answer.sample.kind for answer in self.answers})
        by_kind = {kind: row_of(one.score for one in self.answers if one.sample.kind == kind) for kind in kinds}
        return {**by_kind, ALL: row_of(one.score for one in self.answers)}

    @property
    def ttft_ms(self) -> list[float]:
        """The TTFT of each answer that encoded an image, without the first answer of the process."""
        timings = (one.timings for one in self.answers if one.timings)
        return [one.ttft_ms for one in timings if not one.cached_images and not one.cold]

    @property
    def failures(self) -> list[Answer]:
        """The answers to questions that failed."""
        return [one for one in self.answers if one.error]

    def as_dict(self) -> dict[str, Any]:
        """Returns the object described at the top of this file."""
        times = self.ttft_ms
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "questions": len(self.answers),
            "planned": self.data.count,
            "data": {"name": self.data.name, "metric": self.data.metric, "note": self.data.note},
            "options": self.options,
            "folder": self.folder,
            "environment": self.environment,
            "notes": list(self.notes),
            "accuracy": {kind: asdict(row) for kind, row in self.rows.items()},
            "ttft_ms": {"median": median(times), "n": len(times)} if times else None,
            "seconds": self.seconds,
            "wrong": [one.as_dict() for one in self.answers if one.score < 1],
            "scores": {
                one.sample.id: {"kind": one.sample.kind, "score": one.score, "digest": one.digest}
                for one in self.answers
            },
        }


def folder_facts(folder: ModelFolder) -> dict[str, Any]:
    """Returns the folder's path, and the origin of the model from its manifest."""
    path = folder.path / MANIFEST_NAME
    manifest = read_json_object(path, ModelFolderError) if path.is_file() else {}
    kept = {name: manifest.get(name) for name in ("source", "recipe", "tools")}
    return {"path": str(folder.path), "trained": folder.trained, **kept}


def environment(model: FastVLM) -> dict[str, Any]:
    """Returns the versions, machine and devices that the answers depend on."""
    from ...models._mlx import mx  # a bad request fails before this import

    return {
        "fastvlm": __version__,
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "machine": f"{platform.system()} {platform.machine()}",
        "vision": model.engine.encoder.name,
        "decoder": str(mx.default_device()),
    }


LEVEL = 0.05
"""The p-value below which a change counts as beyond noise."""


@dataclass(frozen=True)
class Change:
    """The change of scores over the questions of one kind that both runs asked."""

    n: int
    old: float
    new: float
    """Mean scores, 0 to 1."""
    better: int
    worse: int
    """The numbers of questions whose score rose and fell."""
    p: float
    """The probability of a split at least as uneven, if chance alone had changed the scores."""

    @property
    def points(self) -> float:
        """The gain of the new run in percentage points."""
        return 100 * (self.new - self.old)

    @property
    def beyond_noise(self) -> bool:
        """True if the change is significant at `LEVEL`."""
        return self.p < LEVEL

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, `points` and `beyond_noise`."""
        return {**asdict(self), "points": self.points, "beyond_noise": self.beyond_noise}


@dataclass(frozen=True)
class Comparison:
    """An evaluation compared with an earlier one."""

    old_folder: str
    changes: dict[str, Change]
    """The changes by kind, with `all` last. Empty if no question is the same."""
    left_out: int
    """The number of new questions that the old run did not ask about the same image with the same answers."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the object that `fastvlm eval --json` has under `comparison`."""
        changes = {kind: change.as_dict() for kind, change in self.changes.items()}
        return {"old_folder": self.old_folder, "left_out": self.left_out, "changes": changes}


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Reads a report of `fastvlm eval`. Raises DataSetError."""
    values = read_json_object(Path(path), DataSetError)
    if values.get("schema") != SCHEMA:
        raise DataSetError(
            f"{path} must be a report of `fastvlm eval` with the schema {SCHEMA} (got {values.get('schema')!r:.40})."
        )
    scores = values.get("scores")
    if not isinstance(scores, dict) or not all(_is_score(entry) for entry in scores.values()):
        raise DataSetError(f"{path} has no valid scores. Write the report again with `fastvlm eval`.")
    return values


def compare(new: Evaluation, old: Mapping[str, Any]) -> Comparison:
    """Compares `new` with an earlier evaluation from `read_evaluation`, over the questions that both asked."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for answer in new.answers:
        before = old["scores"].get(answer.sample.id)
        if before is not None and before["digest"] == answer.digest:
            pairs.setdefault(answer.sample.kind, []).append((before["score"], answer.score))
    both = [pair for kind in pairs.values() for pair in kind]
    changes = {kind: change(pairs[kind]) for kind in sorted(pairs)}
    if both:
        changes[ALL] = change(both)
    facts = old.get("folder")
    folder = str(facts.get("path")) if isinstance(facts, dict) else "?"
    return Comparison(folder, changes, len(new.answers) - len(both))


def change(pairs: list[tuple[float, float]]) -> Change:
    """Returns the change from (old, new) scores of the same questions."""
    n = len(pairs)
    better, worse = sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)
    old, new = (sum(side) / n for side in zip(*pairs, strict=True))
    return Change(n, old, new, better, worse, sign_test(better, worse))


def _is_score(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("score"), int | float)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("kind"), str)
    )


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


@dataclass(frozen=True)
class Question:
    """A sample whose request was prepared, or could not be."""

    sample: Sample
    digest: str = ""
    request: PreparedRequest | None = None


class EvaluationRun:
    """An iterator that asks one question after the other. `evaluation` has the results so far.

    Images of later questions are decoded in threads meanwhile, and encoded where the encoder has a process. Answers
    are decoded one at a time, because a batch on Metal rounds by how many are in it, and runs must repeat.
    """

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
        begin = time.perf_counter()
        questions = (partial(self._question, sample) for sample in self._data.samples)
        for answered in answers(self._model.engine, questions, batch_size=1):
            (outcome,) = answered.outcomes
            if isinstance(outcome, FastVLMError) and failed is None and not self._answers:
                failed = outcome
            answer = self._answer(answered.subject, outcome)
            self._answers.append(answer)
            self._seconds += time.perf_counter() - begin
            if failed and len(self._answers) == GIVE_UP_AFTER and all(one.error for one in self._answers):
                raise failed
            yield answer
            begin = time.perf_counter()
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

    def _question(self, sample: Sample) -> Asked[Question]:
        """Opens the image of a sample and prepares its request. Runs in a thread."""
        try:
            request = prepare(sample.image, self._data.prompt(sample), **self._options)
            prepared = self._model.engine.prepare(request)
        except FastVLMError as reason:
            return Asked(Question(sample), (reason,))
        return Asked(Question(sample, digest(sample, request), prepared), (prepared,))

    def _answer(self, question: Question, outcome: Generation | FastVLMError) -> Answer:
        sample = question.sample
        if isinstance(outcome, FastVLMError):
            return Answer(sample, None, 0.0, "", None, str(outcome))
        score = self._data.score(sample, outcome.text)
        return Answer(sample, outcome.text, score, question.digest, timings_of(question, outcome))


def timings_of(question: Question, found: Generation) -> Timings:
    """Returns the times of an answer as if its image had not been encoded ahead: with the whole time of the encoder."""
    ahead_ms = sum(pending.predict_ms for pending in question.request.submitted) if question.request else 0.0
    return replace(found.timings, encode_ms=max(found.timings.encode_ms, ahead_ms))


def digest(sample: Sample, request: Request) -> str:
    """Returns a hash of pixels, question and answers, which must agree for two scores to be compared."""
    state = hashlib.blake2b(digest_size=8)
    for image in request.images:
        state.update(repr(image.size).encode())
        state.update(image.tobytes())
    state.update(repr((sample.question, sample.answers)).encode())
    return state.hexdigest()
