"""The data of an evaluation: samples, data sets, and layouts of question files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models.images import ImageSource

Metric = Callable[[str, Sequence[str]], float]
"""A function (prediction, answers) -> 0.0 to 1.0."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""The instruction that LLaVA-1.5 (arXiv 2310.03744, table 7) appends to such questions. FastVLM follows its recipe."""


@dataclass(frozen=True)
class Sample:
    """One question about one image."""

    id: str
    """A name that is the same in every run, as two runs are compared by it."""
    image: ImageSource
    question: str
    answers: tuple[str, ...]
    """The right answers. The metric defines how a prediction is compared with them."""
    kind: str
    """The row of the table that the question counts for."""


@dataclass(frozen=True)
class DataSet:
    """Samples with the metric that scores their answers."""

    name: str
    metric: str
    """The name of the metric, for tables."""
    samples: Iterable[Sample]
    count: int
    score: Callable[[Sample, str], float]
    """A function (sample, prediction) -> 0.0 to 1.0."""
    max_tokens: int
    instruction: str = ""
    """The text appended to each question."""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The words between which answers choose, by kind."""
    note: str = ""
    """A remark for readers of the figures."""

    def prompt(self, sample: Sample) -> str:
        """Returns the question with the instruction."""
        return f"{sample.question}\n{self.instruction}" if self.instruction else sample.question


@dataclass(frozen=True)
class Layout:
    """One form of question files: JSON objects in a list, in a list under `data`, or one per line."""

    name: str
    metric_name: str
    metric: Metric
    keys: tuple[str, ...]
    """The keys by which the first entry of such a file is recognised."""
    read: Callable[[list[dict[str, Any]], Path], Iterator[Sample]]
    """A function (entries, file) -> samples, with `image` as named in the file. Malformed entries may raise KeyError,
    TypeError, ValueError or AttributeError."""
    image_folders: tuple[str, ...] = ("images",)
    """The folders, next to the file or one level up, that are searched for images."""
    instruction: str = SHORT_ANSWER
    max_tokens: int = 32
    many_files: bool = False
    """True if one split comes in several files."""
