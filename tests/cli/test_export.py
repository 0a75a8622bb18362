"""`fastvlm export` as a user types it, and the temporary export of other commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.cli.export import exported
from fastvlm.cli.progress import StageProgress
from fastvlm.models.errors import FastVLMError


def test_results_go_to_stdout_and_progress_to_stderr(fastvlm: Callable, tmp_path: Path) -> None:
    done = fastvlm("export", "random:tiny", "--quant", "int8", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("out: ")
    assert "image_features" in done.stdout
    lines = done.stderr.splitlines()
    assert any(line.startswith("  convert to Core ML") for line in lines)
    assert lines[-1] == "note: random weights: the text means nothing"
    assert all(line.startswith("  ") for line in lines[:-1])  # nothing of coremltools' own
    for noise in ("_MLModelProxy", "not been tested", "scikit-learn", "Running", "passes", "Warning"):
        assert noise not in done.stdout + done.stderr


def test_json_has_folder_and_sizes(here: Callable, tmp_path: Path) -> None:
    done = here("export", "--quant", "fp16", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["folder"] == "tiny-fp16"
    assert (tmp_path / "tiny-fp16" / "fastvlm.json").is_file()
    assert result["trained"] is True
    assert result["total_bytes"] == sum(result["file_bytes"].values())


def test_input_that_is_not_a_checkpoint_is_one_line(
    fastvlm: Callable, here: Callable, one_line_error: Callable, tmp_path: Path, write_checkpoint: Callable
) -> None:
    (tmp_path / "empty").mkdir()
    one_line_error(fastvlm("export", "empty", cwd=tmp_path), "no config.json")
    one_line_error(here("export", "missing", cwd=tmp_path), "neither a folder")
    one_line_error(here("export", "random:9b", cwd=tmp_path), "random:tiny")
    (tmp_path / "text").write_text("hello")
    one_line_error(here("export", "text", cwd=tmp_path), "is a file")
    checkpoint = write_checkpoint()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    one_line_error(here("export", checkpoint, "-o", "out", cwd=tmp_path), "truncated or corrupt")
    weights.rename(checkpoint / "pytorch_model.bin")
    one_line_error(here("export", checkpoint, "-o", "out", cwd=tmp_path), "pickle")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_existing_folder_needs_force(here: Callable, one_line_error: Callable, model: Path) -> None:
    one_line_error(here("export", "-o", model, cwd=model.parent), "Pass --force")


@pytest.mark.parametrize(
    "words",
    [("--quant", "int3"), ("--decoder-bits", "3"), ("--io", "png"), ("--min-os", "ios16"), ("--format", "onnx")],
)
def test_unknown_choice_lists_the_known_ones(here: Callable, tmp_path: Path, words: tuple[str, str]) -> None:
    done = here("export", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not one of" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_terminated_export_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvlm.cli.main", "export", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "run the checkpoint's encoder" in line:
                process.terminate()
                break
        process.communicate(timeout=300)
    assert process.returncode == 128 + 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_export_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvlm.cli.main", "export", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "run the checkpoint's encoder" in line:
                process.send_signal(signal.SIGINT)
                break
        _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert rest.strip().splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_exported_folder_is_used_as_it_is(model: Path) -> None:
    with StageProgress() as progress, exported(str(model), progress) as folder:
        assert folder == model
    assert model.is_dir()


@pytest.mark.slow
def test_checkpoint_is_exported_and_removed_again() -> None:
    with StageProgress() as progress, exported("random:tiny", progress) as folder:
        assert (folder / "fastvlm.json").is_file()
    assert not folder.exists()


def test_unknown_model_is_an_error_before_any_export(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with StageProgress() as progress, pytest.raises(FastVLMError, match="nowhere"), exported(nowhere, progress):
        raise AssertionError
