"""The comparison of two evaluations: changes on the questions that both asked, with a test against chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...models.errors import DataSetError
from ...models.files import read_json_object
from .report import ALL, SCHEMA, Evaluation
from .significance import sign_test

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
