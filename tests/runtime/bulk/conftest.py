"""Images of a bulk run, and a stand-in for the model where only files matter."""

from __future__ import annotations

import contextlib
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


def make_images(folder: Path, count: int) -> None:
    """Writes small images, all different, and one that is broken."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(folder / f"{n:03d}.png")
    (folder / "broken.png").write_bytes(b"no picture")


@contextlib.contextmanager
def two_nodes(head_cpus: int = 1) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the address of a Ray cluster of two nodes, and a function that kills all processes of the second."""
    pytest.importorskip("ray", reason="needs the extra ray")
    import ray
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {
        "num_cpus": head_cpus,
        "object_store_memory": memory,
        "include_dashboard": False,
        "_system_config": soon,  # a killed node is known after about a second
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=memory)
        yield cluster.address, lambda: cluster.remove_node(node, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
