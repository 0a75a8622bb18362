"""The log of a bulk run: whole lines, one writer, and a bounded memory of its keys."""

from __future__ import annotations

import fcntl
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.models.errors import OutputError, UsageError
from fastvlm.runtime.bulk import log as log_module
from fastvlm.runtime.bulk.log import CaptionLog, KeySet, key_digest, run_digest


def files(path: Path) -> list[str]:
    return [json.loads(line)["file"] for line in path.read_text().splitlines()]


@given(st.lists(st.text(max_size=3)))
def test_key_set_equals_a_set_of_strings(keys: list[str]) -> None:
    table, known = KeySet(), set()
    for key in keys:
        assert table.add(key) == (key not in known)
        known.add(key)
    assert len(table) == len(known)
    assert all(key in table for key in known)
    assert all((key in table) == (key in known) for key in "abcdef")


def test_key_set_takes_24_bytes_per_key_at_most() -> None:
    tracemalloc.start()
    try:
        table = KeySet()
        for n in range(30_000):
            table.add(f"{n}.jpg")
        assert len(table) == 30_000
        assert all(f"{n}.jpg" in table for n in range(0, 30_000, 99)) and "x.jpg" not in table
        assert tracemalloc.get_traced_memory()[0] < 24 * 30_000 + 2000
    finally:
        tracemalloc.stop()


def test_key_digest_is_the_same_on_every_machine() -> None:
    assert key_digest("a/b.jpg") == 0xAECC9F4D3B67ED67


@pytest.mark.parametrize("torn", [b"", b'{"file": "e.we', b"\0\0\0"], ids=["whole", "torn", "zeros"])
def test_torn_line_is_removed_and_the_rest_is_known(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    with CaptionLog(path, "r") as log:
        log.add("a.png", {"text": "a"})
        log.add("b.png", {"error": "broken"})
    with path.open("ab") as file:
        file.write(torn)
    with CaptionLog(path, "r") as log:
        assert (len(log.done), "a.png" in log.done, "e.webp" in log.done, log.failures) == (2, True, False, 1)
        assert log.last == {"file": "b.png", "error": "broken", "run": "r"}
        log.add("c.png", {"text": "é"})
        assert [entry["file"] for entry in log.entries()] == ["a.png", "b.png", "c.png"]
    assert files(path) == ["a.png", "b.png", "c.png"]


def test_usage_error_when_the_file_is_of_another_run(tmp_path: Path) -> None:
    with CaptionLog(tmp_path / "out.jsonl", "r") as log:
        log.add("a.png", {"text": "a"})
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UsageError, match="captions of another model, prompt or options"):
        CaptionLog(tmp_path / "out.jsonl", "other")
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["hello\n", "{}\n", "[1]\n", '{"file": 3, "run": "r"}\n', "[" * 100000 + "\n"])
def test_usage_error_when_the_file_has_other_content(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"out\.jsonl: line 1 is not a caption written by fastvlm"):
        CaptionLog(tmp_path / "out.jsonl", "r")
    assert (tmp_path / "out.jsonl").read_text() == content


def test_pipes_devices_and_endless_lines_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OutputError, match="is not a regular file"):
            CaptionLog(path, "r")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**31)  # sparse: takes no disk
    with pytest.raises(UsageError, match=r"line 1 must have less than 16,777,216 bytes"):
        CaptionLog(tmp_path / "huge", "r")
    assert (tmp_path / "huge").stat().st_size == 2**31


def test_output_error_when_another_process_writes(tmp_path: Path) -> None:
    with CaptionLog(tmp_path / "out.jsonl", "r"), pytest.raises(OutputError, match="by another process"):
        CaptionLog(tmp_path / "out.jsonl", "r")
    assert not (tmp_path / "out.jsonl").exists(), "a file without a line is not left behind"
    (tmp_path / "empty.jsonl").touch()
    CaptionLog(tmp_path / "empty.jsonl", "r").__exit__(None, None, None)
    assert (tmp_path / "empty.jsonl").exists(), "what was there before stays"
    with pytest.raises(OutputError, match="cannot be written"):
        CaptionLog(tmp_path / "gone" / "out.jsonl", "r")


def before_next_lock(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Makes another process act between the opening and the locking of a file."""
    flock = fcntl.flock

    def acting(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        act()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", acting)


def test_captions_stay_when_two_processes_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, others = tmp_path / "out.jsonl", []
    before_next_lock(monkeypatch, lambda: others.append(CaptionLog(path, "r")))
    with pytest.raises(OutputError, match="by another process"):
        CaptionLog(path, "r")  # made the file, but the other one locked it
    with others.pop() as other:
        other.add("a.png", {"text": "a"})
    assert files(path) == ["a.png"]


def test_file_that_is_removed_before_the_lock_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CaptionLog(tmp_path / "out.jsonl", "r")
    before_next_lock(monkeypatch, lambda: first.__exit__(None, None, None))
    with pytest.raises(OutputError, match="was removed by another process just now. Run the same command again"):
        CaptionLog(tmp_path / "out.jsonl", "r")


def test_another_file_under_the_name_is_not_removed(tmp_path: Path) -> None:
    with CaptionLog(tmp_path / "out.jsonl", "r"):
        (tmp_path / "out.jsonl").unlink()
        (tmp_path / "out.jsonl").touch()
    assert (tmp_path / "out.jsonl").exists()


def test_line_is_whole_when_the_system_writes_it_in_parts(tmp_path: Path) -> None:
    with CaptionLog(tmp_path / "out.jsonl", "r") as log:
        original = log._file
        log._file = type("Slow", (), {"write": lambda self, data: original.write(data[:3])})()  # type: ignore[assignment]
        log.add("a.png", {"text": "é"})
        log._file = original
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"file": "a.png", "text": "é", "run": "r"}


def test_runs_differ_by_model_prompts_and_options(tmp_path: Path) -> None:
    models = [tmp_path / name for name in "ab"]
    for model in models:
        model.mkdir()
        (model / "fastvlm.json").write_text(model.name)
    prompts = (["x"], ["y"], ["x", "y"])
    digests = {run_digest(model, texts, {"n": n}) for model in models for texts in prompts for n in (1, 2)}
    assert len(digests) == 12
    assert run_digest(models[0], ["x"], {"n": 1}) in digests
    assert run_digest(tmp_path, ["\udcff"], {}) != run_digest(tmp_path, ["x"], {})
    assert log_module.MAX_LINE_BYTES > 2**20
