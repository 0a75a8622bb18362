"""Captions by actors on real Ray clusters: the local engine's rows, also when actors and machines end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastvlm._version import __version__
from fastvlm.models.errors import MachineError, ModelFolderError, PromptError, UsageError
from fastvlm.runtime.bulk import ray_pool
from fastvlm.runtime.bulk.log import run_digest
from fastvlm.runtime.bulk.pipeline import Captioner
from fastvlm.runtime.bulk.ray_pool import MAX_DEATHS, RayCaptioner
from fastvlm.runtime.bulk.ray_worker import Worker, WorkerSetup
from fastvlm.runtime.bulk.sources import Item, Source
from fastvlm.runtime.fastvlm import load
from fastvlm.tests.runtime.bulk.conftest import BROKEN, NAMES, make_images, two_nodes

POISON = b"poison"


class SizeWorker(Worker):
    """An actor whose captions are sizes. The bytes POISON end it, and options make it fail in other ways."""

    def open(self, setup: WorkerSetup) -> tuple[str, str, str, tuple[str, ...]]:
        fault = setup.options.get("fault")
        if fault == "exit":
            os._exit(3)
        if fault == "prompt":
            raise PromptError("the prompt is empty. Write one.")
        if fault == "version":
            return "0.0", "", "there", ()
        digest = "other" if fault == "digest" else run_digest(Path(setup.folder), (), {})
        return __version__, digest, "there", ("a note",)

    def caption(self, images: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        if any(content == POISON for _, content in images):
            os._exit(3)
        return [{"text": f"{name} {len(content)}", "pid": os.getpid()} for name, content in images]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray cluster of this process. Its workers unpickle the classes of this file by value."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray_pool.connect("local", actors=2, actor_cpus=1)
    yield
    ray.shutdown()


@pytest.fixture
def sizes(
    local_ray: None, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RayCaptioner]:
    """A function that returns a captioner whose actors are of SizeWorker."""
    monkeypatch.setattr(ray_pool, "Worker", SizeWorker)
    folder = write_folder()
    return lambda actors=2, **options: RayCaptioner(folder, ["a"], options, actors=actors, batch_size=2)


def bytes_items(*contents: bytes) -> list[Item]:
    return [Item(f"{n}.png", lambda content=content: content) for n, content in enumerate(contents)]


@pytest.mark.slow
def test_rows_are_in_order_and_name_their_files(sizes: Callable[..., RayCaptioner], pictures: Path) -> None:
    with sizes() as captioner:
        rows = list(captioner.rows(bytes_items(*(bytes(n) for n in range(200)))))
        again = list(captioner.rows(Source([pictures])))
        assert captioner.notes == ("a note",)
    assert [row.key for row in rows] == [f"{n}.png" for n in range(200)]
    assert [row.entry["text"] for row in rows] == [f"{n}.png {n}" for n in range(200)]
    assert [row.key for row in again] == NAMES
    assert [row.image for row in again] == [pictures / name for name in NAMES]
    assert again[2].entry["text"] == f"{pictures / BROKEN} 10", "an actor, not this process, finds that it is broken"


@pytest.mark.slow
def test_image_that_ends_actors_gets_an_error(sizes: Callable[..., RayCaptioner]) -> None:
    contents = [bytes(n) for n in range(40)]
    contents[13] = POISON
    with sizes() as captioner:
        rows = list(captioner.rows(bytes_items(*contents)))
        assert MAX_DEATHS <= captioner.lost <= MAX_DEATHS + 1, "the reply to the task before may be lost too"
        assert f"{captioner.lost} actors ended before the run did" in captioner.notes[-1]
    assert [row.key for row in rows] == [f"{n}.png" for n in range(40)]
    assert [row.key for row in rows if row.error] == ["13.png"]
    assert rows[13].entry["error"].startswith(f"13.png ended {MAX_DEATHS} actors: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("exit", MachineError, "actors end while they load the model: "),
        ("prompt", PromptError, "the prompt is empty. Write one."),
        ("version", MachineError, "there has fastvlm 0.0, and this machine"),
        ("digest", ModelFolderError, "on there differs from the one here. Copy the same folder."),
    ],
)
def test_actor_that_cannot_load_ends_the_run(
    sizes: Callable[..., RayCaptioner], fault: str, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as raised:
        sizes(actors=1, fault=fault)
    assert type(raised.value) is kind
    assert text in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.slow
def test_all_actors_work_and_images_are_read_a_few_ahead(sizes: Callable[..., RayCaptioner]) -> None:
    taken = 0

    def endless() -> Iterator[Item]:
        nonlocal taken
        while True:
            taken += 1
            yield Item(str(taken), lambda: b"abc")

    with sizes() as captioner:
        found = captioner.rows(endless())
        rows, pids = 0, set()
        for row in found:
            rows += 1
            pids.add(row.entry["pid"])
            assert row.key == str(rows)
            if len(pids) == 2 and rows >= 100:
                break
    assert taken <= rows + 3 * ray_pool.TASKS_PER_ACTOR * 2 * ray_pool.BATCHES_PER_TASK * 2


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """Returns a line without its times, and without the digest of the run."""
    return {name: value for name, value in line.items() if name not in ("timings", "run")}


@pytest.mark.slow
def test_killed_node_loses_and_repeats_nothing(
    random_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images", 60)
    given = ["caption", "images", "--model", random_tiny, "-p", "What?", "--max-tokens", "24", "--ignore-eos"]
    command = [sys.executable, "-m", "fastvlm.cli.main", *map(str, given), "--batch-size", "2"]
    with two_nodes() as (address, kill_second):
        cluster = ("--engine", "ray", "--address", address, "--actors", "2")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        log, deadline = tmp_path / "ray.jsonl", time.monotonic() + 60
        with subprocess.Popen([*command, *cluster, "-o", str(log)], cwd=tmp_path, **pipes) as run:
            try:
                while (not log.exists() or log.read_bytes().count(b"\n") < 6) and time.monotonic() < deadline:
                    assert run.poll() is None, run.communicate()
                    time.sleep(0.01)
                kill_second()
                before = log.read_bytes().count(b"\n")
                out, errors = run.communicate(timeout=60)
            finally:
                run.kill()
    assert 6 <= before < 40, "the node was killed in the middle of the run"
    assert (run.returncode, out) == (1, ""), errors
    assert "note: 1 actor ended before the run did" in errors
    assert "1 of 61 images have no caption" in errors
    monkeypatch.chdir(tmp_path)
    local = Captioner(load(random_tiny), "What?", {"max_tokens": 24, "ignore_eos": True})
    expected = [untimed({"file": row.key, **row.entry}) for row in local.rows(Source(["images"]))]
    assert [untimed(json.loads(line)) for line in log.read_text().splitlines()] == expected
    assert len({line["file"] for line in expected}) == 61


@pytest.mark.slow
def test_address_without_a_cluster_is_an_error() -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    for address, text in (
        ("127.0.0.1:1", "Connection refused"),
        ("nonsense", "Invalid"),
        ("ray://127.0.0.1:10001", "it must be local, auto or HOST:PORT"),
    ):
        with pytest.raises(MachineError, match=text):
            ray_pool.check_address(address)


def test_missing_ray_and_wrong_counts_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_pool, "require_ray", lambda: None)
    with pytest.raises(UsageError, match="actors must be at least 1"):
        RayCaptioner(tmp_path, ["a"], {}, actors=0)
    monkeypatch.undo()
    monkeypatch.setattr(ray_pool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install \"fastvlm\[ray\]\""):
        RayCaptioner(tmp_path, ["a"], {})
