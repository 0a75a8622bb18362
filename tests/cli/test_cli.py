"""The commands as a user types them: each in a process of its own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "runtime" / "samples" / "shapes.png"


def fastvlm(
    *words: object, cwd: Path, stdin: str = "", start: Sequence[str] = ("-m", "fastvlm.cli.main")
) -> subprocess.CompletedProcess:
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=stdin, timeout=300)


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in last


def test_version_and_help(tmp_path: Path) -> None:
    assert fastvlm("--version", cwd=tmp_path).stdout.startswith("fastvlm 0.")
    help_text = fastvlm("--help", cwd=tmp_path).stdout
    assert all(command in help_text for command in ("export", "generate", "verify", "doctor"))


@pytest.mark.parametrize("words", [[], ["nonsense"], ["export", "--bits", "4"], ["generate", "x"], ["verify", "x"]])
def test_wrong_usage_exits_with_2(tmp_path: Path, words: list[str]) -> None:
    assert fastvlm(*words, cwd=tmp_path).returncode == 2


def test_export_prints_results_to_stdout_and_progress_to_stderr(tmp_path: Path) -> None:
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


def test_export_as_json(tmp_path: Path) -> None:
    done = fastvlm("export", "--quant", "fp16", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["folder"] == "tiny-fp16"
    assert (tmp_path / "tiny-fp16" / "fastvlm.json").is_file()
    assert result["trained"] is True
    assert result["total_bytes"] == sum(result["file_bytes"].values())


def test_generate_streams_text_and_tells_the_time(model: Path, tmp_path: Path) -> None:
    done = fastvlm("generate", model, "-i", SAMPLE, "-p", "Describe the image.", "--max-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "TTFT" in done.stderr
    assert "cold: first call of this process" in done.stderr
    assert "note: random weights: the text means nothing" in done.stderr
    assert all(stage in done.stderr for stage in ("preprocess", "encode", "project", "prefill", "sample"))


def test_generate_as_json_adds_up(model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "-i", SAMPLE, "--max-tokens", 6, "--ignore-eos", "--json")
    result = json.loads(fastvlm(*words, "-p", "Describe.", cwd=tmp_path).stdout)
    assert len(result["token_ids"]) == 6
    assert result["finish_reason"] == "length"
    timings = result["timings"]
    stages = sum(timings[f"{stage}_ms"] for stage in ("preprocess", "encode", "project", "prefill", "sample"))
    assert stages == pytest.approx(timings["ttft_ms"], abs=0.01)  # each is rounded to a microsecond
    assert "random weights: the text means nothing" in result["notes"]
    piped = json.loads(fastvlm(*words, "-p", "-", cwd=tmp_path, stdin="Describe.").stdout)
    assert piped["token_ids"] == result["token_ids"]
    assert piped["text"] == result["text"]


WITHOUT_ENCODER = """
from fastvlm.models.errors import PackageError
from fastvlm.runtime.encoders import ReferenceEncoder
def encode(self, pixel_values):
    raise PackageError("an image is encoded")
ReferenceEncoder.encode = encode
from fastvlm.cli.main import main
main()
"""


def test_generate_without_an_image_encodes_nothing(model: Path, tmp_path: Path) -> None:
    words = (model, "--vision", "reference", "-p", "Hello", "--max-tokens", 2, "--ignore-eos", "--json")
    done = fastvlm("generate", *words, cwd=tmp_path, start=("-c", WITHOUT_ENCODER))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    with_image = fastvlm("generate", *words, "-i", SAMPLE, cwd=tmp_path, start=("-c", WITHOUT_ENCODER))
    assert_one_line_error(with_image, "an image is encoded")


def test_verify_passes_and_fails_by_exit_code(model: Path, tmp_path: Path, write_checkpoint: Callable) -> None:
    good = fastvlm("verify", model, "--against", "random:tiny", cwd=tmp_path)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "passed")

    def change(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= -1

    bad = fastvlm("verify", model, "--against", write_checkpoint(change=change), "--json", cwd=tmp_path)
    assert bad.returncode == 1
    result = json.loads(bad.stdout)
    assert result["passed"] is False
    assert result["failures"][0].startswith("language_model.model.layers.0.mlp.up_proj.weight is ")
    assert result["failures"][1].startswith("logits reach")


def test_doctor_names_the_blas_and_the_versions(tmp_path: Path) -> None:
    done = fastvlm("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["coremltools"]["detail"].startswith("9.")
    if sys.platform == "linux":
        assert "BLAS" in findings
        assert findings["vision"]["state"] == "limited"
    plain = fastvlm("doctor", cwd=tmp_path).stdout
    assert all(subject in plain for subject in findings)


def test_export_of_what_is_no_checkpoint(tmp_path: Path, write_checkpoint: Callable) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line_error(fastvlm("export", "empty", cwd=tmp_path), "no config.json")
    assert_one_line_error(fastvlm("export", "missing", cwd=tmp_path), "neither a folder")
    assert_one_line_error(fastvlm("export", "random:9b", cwd=tmp_path), "random:tiny")
    (tmp_path / "text").write_text("hello")
    assert_one_line_error(fastvlm("export", "text", cwd=tmp_path), "is a file")
    checkpoint = write_checkpoint()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line_error(fastvlm("export", checkpoint, "-o", "out", cwd=tmp_path), "truncated or corrupt")
    weights.rename(checkpoint / "pytorch_model.bin")
    assert_one_line_error(fastvlm("export", checkpoint, "-o", "out", cwd=tmp_path), "pickle")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_export_over_an_existing_folder(model: Path) -> None:
    assert_one_line_error(fastvlm("export", "-o", model, cwd=model.parent), "pass --force")


@pytest.mark.parametrize(
    ("content", "name"), [(b"", "empty.png"), (b"just words", "text.jpg"), (SAMPLE.read_bytes()[:900], "cut.png")]
)
def test_generate_from_what_is_no_image(model: Path, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    done = fastvlm("generate", model, "--image", name, "--prompt", "x", cwd=tmp_path)
    assert_one_line_error(done, name)


def test_generate_with_what_is_not_there(model: Path, tmp_path: Path) -> None:
    assert_one_line_error(fastvlm("generate", model, "-i", "gone.png", "-p", "x", cwd=tmp_path), "gone.png")
    assert_one_line_error(fastvlm("generate", "gone", "-p", "x", cwd=tmp_path), "gone")
    assert_one_line_error(fastvlm("generate", model, "-p", "x", "--top-p", "7", cwd=tmp_path), "top_p")
    assert_one_line_error(
        fastvlm("generate", model, "-p", "x", "--fit", "squash", "-i", SAMPLE, cwd=tmp_path), "squash"
    )


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


def test_inspect_describes_a_package_and_lints_it(model: Path, tmp_path: Path) -> None:
    done = fastvlm("inspect", model, cwd=tmp_path)
    assert done.returncode == 0
    assert "images fp32[1, 3, 256, 256]" in done.stdout
    assert "int8 affine" in done.stdout
    report = json.loads(fastvlm("inspect", model / "fastvithd.mlpackage", "--json", cwd=tmp_path).stdout)
    assert report["operations"]["conv"] == 46
    assert_one_line_error(fastvlm("inspect", "gone", cwd=tmp_path), "neither a .mlpackage")
    if sys.platform != "darwin":
        assert_one_line_error(fastvlm("inspect", model, "--placement", cwd=tmp_path), "only macOS can tell")


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


def test_reader_that_has_enough_ends_generation_quietly(model: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m fastvlm.cli.main generate {model} -p hi --ignore-eos | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0
    assert b"Error" not in done.stderr
    assert b"Traceback" not in done.stderr


def test_strangers_texts_reach_the_terminal_tame(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    manifest = json.loads((copy / "fastvlm.json").read_text())
    manifest["notes"] = ["\x1b[2J\x07 hello\nerror: forged " + "x" * 5000]
    (copy / "fastvlm.json").write_text(json.dumps(manifest))
    done = fastvlm("generate", copy, "-p", "hi", "--max-tokens", 1, cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert "\\x1b[2J" in line
    assert len(line) < 700
    assert not any(line.startswith("error") for line in done.stderr.splitlines())


def test_bad_requests_are_told_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()  # loading would fail on this
    assert_one_line_error(fastvlm("generate", copy, "-i", "gone.png", "-p", "x", cwd=tmp_path), "gone.png")
    assert_one_line_error(fastvlm("generate", copy, "-p", "x", "--temperature", "-1", cwd=tmp_path), "temperature")
    assert_one_line_error(fastvlm("generate", copy, "-p", "x", cwd=tmp_path), "model.safetensors is missing")
