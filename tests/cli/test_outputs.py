"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastvlm.cli.outputs import write_picture, write_whole


def test_earlier_file_gives_way_to_the_new_one(tmp_path: Path) -> None:
    report, link = tmp_path / "report.json", tmp_path / "latest.json"
    report.write_bytes(b"old")
    link.symlink_to(report)
    write_whole(link, b"new")
    assert (report.read_bytes(), link.is_symlink()) == (b"new", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "report.json"]


def test_full_disk_leaves_the_earlier_report(tmp_path: Path) -> None:
    report = tmp_path / "estimate.json"
    report.write_bytes(b"{}")
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm.cli.main", "bench", "tiny", "--estimate", "M1,M2", "--json", str(report)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")
    assert report.read_bytes() == b"{}"
    assert list(tmp_path.iterdir()) == [report]


def test_picture_that_cannot_be_drawn_leaves_the_earlier_one(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"old")

    def fail(file: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_picture(picture, fail)
    assert picture.read_bytes() == b"old"


def test_pipes_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=write_whole, args=(pipe, b"report"))
    writer.start()
    assert pipe.read_bytes() == b"report"
    writer.join()
    assert pipe.is_fifo()
