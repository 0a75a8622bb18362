"""A bulk run as a whole: what waits, what is known, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import OutputError, UsageError
from fastvlm.runtime.bulk.job import Job
from fastvlm.runtime.bulk.outputs import output_for
from fastvlm.runtime.bulk.pipeline import Captioner
from fastvlm.runtime.bulk.sources import Item, Source
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.tests.runtime.bulk.conftest import NAMES, Digests


def test_images_are_captioned_into_the_log(vlm: FastVLM, pictures: Path, tmp_path: Path) -> None:
    captioner = Captioner(vlm, "Describe it.", {"max_tokens": 3}, batch_size=2)
    for known in (0, 6):
        with Job(Source([pictures]), output_for(tmp_path / "out.jsonl"), "run") as job:
            assert job.is_complete == bool(known)
            assert [captioned.key for captioned in job.captions(captioner)] == ([] if known else NAMES)
            assert (job.seen, job.known, job.written, job.failures) == (6, known, known, 1)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6


def test_key_that_occurs_twice_is_captioned_once(tmp_path: Path) -> None:
    items = [Item(key, lambda: b"x") for key in "abab"]
    with Job(items, output_for(tmp_path / "out.jsonl"), "run") as job:
        assert not job.is_complete
        assert [captioned.key for captioned in job.captions(Digests())] == ["a", "b"]  # type: ignore[arg-type]
        assert (job.seen, job.known) == (4, 2)


def test_image_is_loaded_before_the_next_is_taken(tmp_path: Path) -> None:
    order = []

    def items() -> object:
        for key in "abc":
            order.append(f"take {key}")
            yield Item(key, lambda key=key: order.append(f"load {key}") or b"x")  # type: ignore[misc]

    with Job(items(), output_for(tmp_path / "out.jsonl"), "run") as job:  # type: ignore[arg-type]
        assert not job.is_complete
        list(job.captions(Digests()))  # type: ignore[arg-type]
    assert order == [f"{act} {key}" for key in "abc" for act in ("take", "load")]


def test_second_run_at_the_same_time_is_refused(pictures: Path, tmp_path: Path) -> None:
    for out, kind in (("out.jsonl", None), ("out.csv", None), ("texts", "txt"), ("shards", "webdataset")):
        with (
            Job(Source([pictures]), output_for(tmp_path / out, kind), "run"),
            pytest.raises(OutputError, match="another"),
        ):
            Job(Source([pictures]), output_for(tmp_path / out, kind), "run")


def test_output_of_another_run_is_refused(digest: Callable[..., Job], pictures: Path, tmp_path: Path) -> None:
    digest("out.csv", stop_after=1)
    with pytest.raises(UsageError, match="captions of another model"):
        Job(Source([pictures]), output_for(tmp_path / "out.csv"), "other")
