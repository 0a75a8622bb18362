"""Output files of commands, written whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.cli.outputs import check_outputs, check_pictures, check_reports, check_tables, write_picture, write_whole
from fastvlm.models.errors import UsageError
from fastvlm.runtime.estimate.chips import chip_named
from fastvlm.runtime.estimate.report import estimate_lines
from fastvlm.runtime.estimate.roofline import estimate
from fastvlm.runtime.estimate.work import Work, encoder_cost

REPORT = b'{\n  "schema": "fastvlm.estimate/1"\n}\n'
TABLES = b"**model**: int8, 256 px\n\n| ms         | median run |\n|---|--:|\n"


def test_new_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    report, link = tmp_path / "report.json", tmp_path / "latest.json"
    report.write_bytes(b"old")
    link.symlink_to(report)
    write_whole(link, b"new")
    assert (report.read_bytes(), link.is_symlink()) == (b"new", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "report.json"]


@pytest.mark.slow
def test_full_disk_leaves_the_earlier_report(tmp_path: Path) -> None:
    report = tmp_path / "estimate.json"
    report.write_bytes(REPORT)
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm.cli.main", "bench", "tiny", "--estimate", "M1,M2", "--report", str(report)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")
    assert report.read_bytes() == REPORT
    assert list(tmp_path.iterdir()) == [report]


def test_failed_drawing_leaves_the_earlier_image(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"old")

    def fail(file: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_picture(picture, fail)
    assert picture.read_bytes() == b"old"


def test_pipe_is_written_in_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=write_whole, args=(pipe, b"report"))
    writer.start()
    assert pipe.read_bytes() == b"report"
    writer.join()
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("check", "name", "theirs", "ours"),
    [
        (check_reports, "a.json", b'{"model_type": "llava_qwen2"}', REPORT),
        (check_reports, "README.md", b"# Notes\n", b""),
        (check_tables, "README.md", b"# Notes\n", TABLES),
        (check_tables, "b.md", b"**Notes**\n\n| a | b |\n", b"An estimate from peak rates and so on"),
        (check_pictures, "photo.png", b"\xff\xd8\xff\xe0 a JPEG", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_only_own_files_are_overwritten(
    tmp_path: Path, check: Callable[..., None], name: str, theirs: bytes, ours: bytes
) -> None:
    path = tmp_path / name
    check(None, path)
    path.write_bytes(theirs)
    with pytest.raises(UsageError, match="Choose another name, or remove it"):
        check(None, path)
    path.write_bytes(ours)
    check(None, path)


def test_earlier_estimate_is_overwritten(tmp_path: Path) -> None:
    from fastvlm.models.random_checkpoint import TINY_ENCODER

    work = Work("m", 256, 46, encoder_cost(TINY_ENCODER, 256, 8), 1, 1)
    (tmp_path / "e.md").write_text("\n".join(estimate_lines([estimate(work, chip_named("M1"))])))
    check_tables(tmp_path / "e.md")


@pytest.mark.parametrize("check", [check_outputs, check_reports, check_tables, check_pictures])
def test_model_folder_is_never_written_into(tmp_path: Path, check: Callable[..., None]) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "fastvlm.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for folder in ("model", "model/inner", "link"):
        with pytest.raises(UsageError, match="in the model folder"):
            check(tmp_path / folder / "new.png")
