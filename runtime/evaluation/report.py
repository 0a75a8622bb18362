"""The result of an evaluation, and its JSON.

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

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...models.errors import ModelFolderError
from ...models.files import read_json_object
from ...models.folder_layout import MANIFEST_NAME
from ..folder import ModelFolder
from ..timings import Timings
from .samples import DataSet, Sample
from .significance import wilson_interval

if TYPE_CHECKING:
    from ..fastvlm import FastVLM

SCHEMA = "fastvlm.evaluation/1"
ALL = "all"
"""The name of the row that counts all questions."""
MAX_PATH = 60
"""The number of characters from the end of a folder's path that a title shows."""


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
