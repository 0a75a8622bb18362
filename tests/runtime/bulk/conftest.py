"""Images of a bulk run, and a stand-in for the model where only files matter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm.models.errors import ImageError
from fastvlm.runtime.bulk.job import Job
from fastvlm.runtime.bulk.outputs import output_for
from fastvlm.runtime.bulk.pipeline import Row
from fastvlm.runtime.bulk.sources import Item, Source

BROKEN = "c/broken.jpg"
NAMES = ["a.PNG", "b.png", BROKEN, "c/d.jpg", "c-1.png", "e.webp"]


class DigestRow(Row):
    """A row whose answer is the digest of its image."""

    @property
    def entry(self) -> dict[str, Any]:
        if self.error is not None:
            return {"error": self.error}
        assert self.image is not None
        content = self.image if isinstance(self.image, bytes) else self.image.read_bytes()
        answer = {"digest": hashlib.sha256(content).hexdigest(), "size": len(content)}
        return {"text": f'"{answer["digest"]}",\n<é>', "tokens": 3, "finish_reason": "stop", "answer": answer}


class Digests:
    """Does what a captioner does, without a model."""

    def rows(self, items: Iterable[Item]) -> Iterator[Row]:
        for item in items:
            try:
                image = item.load()
                error = "broken" if isinstance(image, Path) and image.read_bytes() == b"no picture" else None
                yield DigestRow(item.key, image, error=error)
            except ImageError as reason:
                yield Row(item.key, None, error=str(reason))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six images, one of them broken, and two other files."""
    folder = tmp_path / "pictures"
    (folder / "c").mkdir(parents=True)
    for n, name in enumerate(("b.png", "a.PNG", "c/d.jpg", "e.webp", "c-1.png")):
        colour = np.full((20 + n, 30, 3), 40 * n, np.uint8)
        Image.fromarray(colour).save(folder / name)
    (folder / BROKEN).write_bytes(b"no picture")
    (folder / "notes.md").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def digest(pictures: Path, tmp_path: Path) -> Callable[..., Job]:
    """A function that writes up to `stop_after` digests of the images to an output, and returns the ended job."""

    def run(out: str, kind: str | None = None, stop_after: int = 100) -> Job:
        with Job(Source([pictures]), output_for(tmp_path / out, kind), "run") as job:
            for done, _ in enumerate(job.captions(Digests()), 1):  # type: ignore[arg-type]
                if done == stop_after:
                    return job
            job.end()
            return job

    return run
