"""The example of docs/scale.md: Ray Data asks two servers, one of which is killed in the middle."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import fastvlm

from ..bulk.conftest import make_images

ROOT = Path(__file__).resolve().parents[3]

START = """
import ray
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False)
"""


@contextmanager
def served(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts `fastvlm serve` on a free port. Yields its URL and process, and ends it."""
    command = [sys.executable, "-m", "fastvlm.cli.main", "serve", str(folder), "--port", "0"]
    with log.open("w") as sink, subprocess.Popen(command, stderr=sink, cwd=folder.parent) as process:
        try:
            while not (found := re.search(r"serving on (\S+)/v1", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield found[1], process
        finally:
            process.kill()


def example(urls: list[str], images: Path) -> str:
    """Returns the example as a program that asks these servers."""
    (code,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE | re.DOTALL)
    for before, after in (
        (re.search(r"^SERVERS = .*$", code, re.MULTILINE)[0], f"SERVERS = {urls}"),
        ('read_binary_files("photos"', f"read_binary_files({str(images)!r}"),
        ('"max_tokens": 64', '"max_tokens": 24'),
    ):
        assert before in code
        code = code.replace(before, after)
    return START + code


@pytest.mark.slow
def test_ray_data_asks_two_servers_and_survives_one(random_tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    images, folder = tmp_path / "images", Path(shutil.copytree(random_tiny, tmp_path / "model"))
    make_images(images, 40)
    with ExitStack() as stack:
        servers = [stack.enter_context(served(folder, tmp_path / f"{n}.log")) for n in range(2)]
        program = tmp_path / "example.py"
        program.write_text(example([url for url, _ in servers], images))
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        logs = [tmp_path / "0.log", tmp_path / "1.log"]
        with subprocess.Popen([sys.executable, str(program)], cwd=tmp_path, env=environment, **pipes) as run:
            try:
                while min(log.read_text().count(" 200 ") for log in logs) < 5:
                    assert run.poll() is None, run.communicate()[1]
                    time.sleep(0.02)
                servers[1][1].kill()
                before = sum(log.read_text().count(" 200 ") for log in logs)
                _, errors = run.communicate(timeout=120)
            finally:
                run.kill()
    assert run.returncode == 0, errors
    assert before < 35, "the server was killed in the middle of the run"
    rows = {row["path"]: row for row in parquet.read_table(tmp_path / "captions").to_pylist()}
    paths = sorted(images.iterdir())
    assert sorted(rows) == [str(path) for path in paths]
    model = fastvlm.load(folder)
    for path in paths:
        row = rows[str(path)]
        if path.name == "broken.png":
            assert row["text"] == "" and "not the file itself" in row["error"]
        else:
            expected = model.generate(path, "Describe the image.", max_tokens=24).text
            assert (row["text"], row["error"]) == (expected, "")
