"""Captions of a folder: one line per image, and a run that resumes after every kind of interruption."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm.models.errors import ImageError, OutputError, PackageError, PromptError, UsageError
from fastvlm.runtime.captions import CaptionFile, Captions, image_files, label, run_digest
from fastvlm.runtime.fastvlm import FastVLM

OPTIONS: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}
BROKEN = "c/broken.jpg"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six images, one of them broken, and two other files."""
    folder = tmp_path / "pictures"
    (folder / "c").mkdir(parents=True)
    for n, name in enumerate(("b.png", "a.PNG", "c/d.jpg", "e.webp", "c-1.png")):
        colour = np.full((20 + n, 30, 3), 40 * n, np.uint8)
        Image.fromarray(colour).save(folder / name)
    (folder / BROKEN).write_bytes(b"no picture")
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def caption(vlm: FastVLM, pictures: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """A function that captions the first `stop_after` images and returns the lines of the file."""

    def run(
        stop_after: int = 100, name: str = "out.jsonl", run_name: str = "r", batch: int = 2
    ) -> list[dict[str, Any]]:
        out = tmp_path / name
        with CaptionFile(out, run_name) as file:
            for done, _ in enumerate(Captions(pictures, "Describe it.", file, OPTIONS).write(vlm, batch), 1):
                if done == stop_after:
                    break
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "timings"} for line in lines]


def test_images_are_found_by_suffix_in_the_order_of_names(pictures: Path) -> None:
    found = [path.relative_to(pictures).as_posix() for path in image_files(pictures)]
    assert found == ["a.PNG", "b.png", "c/broken.jpg", "c/d.jpg", "c-1.png", "e.webp"]


def test_every_image_has_a_line(caption: Callable[..., list], vlm: FastVLM, pictures: Path) -> None:
    lines = caption()
    assert [line["file"] for line in lines] == [p.relative_to(pictures).as_posix() for p in image_files(pictures)]
    for line in lines:
        if line["file"] == BROKEN:
            assert BROKEN in line["error"]
            assert "text" not in line
            continue
        alone = vlm.generate(pictures / line["file"], "Describe it.", **OPTIONS)
        assert (line["text"], line["tokens"]) == (alone.text, 5)
        assert line["timings"]["ttft_ms"] > 0


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6])
@pytest.mark.parametrize("torn", [b"", b'{"file": "e.we', b"\0\0\0"], ids=["whole", "torn", "zeros"])
def test_interrupted_run_resumes(caption: Callable[..., list], tmp_path: Path, stop_after: int, torn: bytes) -> None:
    whole = caption(name="whole.jsonl", batch=3)
    assert len(caption(stop_after)) == stop_after
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(torn)
    assert without_times(caption()) == without_times(whole)


def test_complete_file_is_not_written_again(caption: Callable[..., list], vlm: FastVLM, tmp_path: Path) -> None:
    caption()
    before, calls = (tmp_path / "out.jsonl").read_bytes(), len(vlm.engine.encoder.calls)
    caption()
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert len(vlm.engine.encoder.calls) == calls


def test_usage_error_when_the_file_is_of_another_run(caption: Callable[..., list], tmp_path: Path) -> None:
    caption(2)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UsageError, match="captions of another model, prompt or options"):
        caption(run_name="other")
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["hello\n", "{}\n", "[1]\n", '{"file": 3, "run": "r"}\n', "[" * 100000 + "\n"])
def test_usage_error_when_the_file_has_other_content(
    caption: Callable[..., list], tmp_path: Path, content: str
) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"out\.jsonl: line 1 is not a caption written by fastvlm"):
        caption()
    assert (tmp_path / "out.jsonl").read_text() == content


def test_pipes_devices_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OutputError, match="is not a regular file"):
            CaptionFile(path, "r")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**31)  # sparse: takes no disk
    with pytest.raises(UsageError, match=r"\(got 2,147,483,648\)\. Name another file"):
        CaptionFile(tmp_path / "huge", "r")
    assert (tmp_path / "huge").stat().st_size == 2**31


def test_output_error_when_another_process_writes(tmp_path: Path) -> None:
    with CaptionFile(tmp_path / "out.jsonl", "r"), pytest.raises(OutputError, match="by another process"):
        CaptionFile(tmp_path / "out.jsonl", "r")
    assert not (tmp_path / "out.jsonl").exists(), "a file without a line is not left behind"
    (tmp_path / "empty.jsonl").touch()
    CaptionFile(tmp_path / "empty.jsonl", "r").__exit__(None, None, None)
    assert (tmp_path / "empty.jsonl").exists(), "what was there before stays"
    with pytest.raises(OutputError, match="cannot be written"):
        CaptionFile(tmp_path / "gone" / "out.jsonl", "r")


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
    before_next_lock(monkeypatch, lambda: others.append(CaptionFile(path, "r")))
    with pytest.raises(OutputError, match="by another process"):
        CaptionFile(path, "r")  # made the file, but the other one locked it
    with others.pop() as other:
        other.add("a.png", {"text": "a"})
    assert json.loads(path.read_text())["file"] == "a.png"


def test_file_that_is_removed_before_the_lock_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CaptionFile(tmp_path / "out.jsonl", "r")
    before_next_lock(monkeypatch, lambda: first.__exit__(None, None, None))
    with pytest.raises(OutputError, match="was removed by another process just now. Run the same command again"):
        CaptionFile(tmp_path / "out.jsonl", "r")


def test_another_file_under_the_name_is_not_removed(tmp_path: Path) -> None:
    with CaptionFile(tmp_path / "out.jsonl", "r"):
        (tmp_path / "out.jsonl").unlink()
        (tmp_path / "out.jsonl").touch()
    assert (tmp_path / "out.jsonl").exists()


def test_line_is_whole_when_the_system_writes_it_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CaptionFile(tmp_path / "out.jsonl", "r") as file:
        original = file._file
        file._file = type("Slow", (), {"write": lambda self, data: original.write(data[:3])})()  # type: ignore[assignment]
        file.add("a.png", {"text": "é"})
        file._file = original
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"file": "a.png", "text": "é", "run": "r"}


def test_image_that_cannot_be_encoded_gets_an_error(caption: Callable[..., list], vlm: FastVLM) -> None:
    encode, calls = vlm.engine.encoder.encode, iter(range(99))

    def failing(pixel_values: np.ndarray) -> np.ndarray:
        if next(calls) == 1:
            raise PackageError("not finite")
        return encode(pixel_values)

    vlm.engine.encoder.encode = failing  # type: ignore[method-assign]
    errors = {line["file"]: line["error"] for line in caption() if "error" in line}
    assert errors["b.png"] == "not finite"
    assert set(errors) == {"b.png", BROKEN}


def test_error_of_the_prompt_ends_the_run(vlm: FastVLM, pictures: Path, tmp_path: Path) -> None:
    with CaptionFile(tmp_path / "out.jsonl", "r") as file, pytest.raises(PromptError, match="<image>: 2, images: 1"):
        list(Captions(pictures, "<image> <image>", file, OPTIONS).write(vlm, 2))
    assert not (tmp_path / "out.jsonl").exists()


def test_image_error_when_there_is_nothing_to_caption(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has no images"):
        image_files(tmp_path)
    with pytest.raises(ImageError, match="is not a folder"):
        image_files(tmp_path / "gone")


def test_runs_differ_by_model_prompt_and_options(tmp_path: Path) -> None:
    models = [tmp_path / name for name in "ab"]
    for model in models:
        model.mkdir()
        (model / "fastvlm.json").write_text(model.name)
    digests = {run_digest(model, prompt, {"n": n}) for model in models for prompt in "xy" for n in (1, 2)}
    assert len(digests) == 8
    assert run_digest(models[0], "x", {"n": 1}) in digests
    assert run_digest(tmp_path, "\udcff", {}) != run_digest(tmp_path, "x", {})


def test_name_that_is_not_utf_8_has_a_label() -> None:
    assert label(Path(os.fsdecode(b"a/\xff.png"))) == "a/\\xff.png"
    assert label(Path("a/é.png")) == "a/é.png"
