"""`fastvlm bench` as a user types it, on an exported `random:tiny`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.cli.outputs import check_pictures, check_reports, check_tables

COMMAND = [sys.executable, "-m", "fastvlm.cli.main", "bench"]
STAGES = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms", "sample_ms")


def bench(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


@pytest.fixture(scope="module")
def measured(model: Path) -> subprocess.CompletedProcess:
    """One benchmark with everything that can be written."""
    words = ("--runs", 2, "--warmup", 0, "--processes", 2, "--max-tokens", 4, "--published")
    return bench(model, *words, "--json", "b.json", "--markdown", "b.md", "--plot", "b.png", cwd=model.parent)


def test_tables_go_to_stdout_and_progress_to_stderr(measured: subprocess.CompletedProcess, model: Path) -> None:
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout == (model.parent / "b.md").read_text()
    for word in ("encode", "prefill", "**TTFT**", "decode, ms per token (", "- machine: ", "random weights"):
        assert word in measured.stdout
    assert "Not measured here: FastVLM paper" in measured.stdout
    assert "  model (2 of 2)" in measured.stderr
    assert "note: random weights: the text means nothing" in measured.stderr
    assert (model.parent / "b.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_written_may_be_replaced(measured: subprocess.CompletedProcess, model: Path) -> None:
    assert measured.returncode == 0, measured.stderr
    check_reports(model.parent / "b.json")
    check_tables(model.parent / "b.md")
    check_pictures(model.parent / "b.png")


def test_report_holds_cold_and_warm_runs_apart(measured: subprocess.CompletedProcess, model: Path) -> None:
    report = json.loads((model.parent / "b.json").read_text())
    assert report["schema"] == "fastvlm.benchmark/1"
    (found,) = report["configurations"]
    assert found["folder"]["source"]["name"] == "random:tiny"
    assert found["sizes_bytes"]["encoder"] > 1000
    assert len(found["processes"]) == 2
    for process in found["processes"]:
        assert process["cold"]["encode_ms"] > 0  # in a process of its own the first answer is cold
        assert len(process["runs"]) == 2
        assert process["mlx_peak_memory_bytes"] > 0
        for run in process["runs"]:
            assert run["encode_ms"] > 0
            assert run["generated_tokens"] == 4
            assert sum(run[stage] for stage in STAGES) == pytest.approx(run["ttft_ms"], rel=0.01)
    assert found["summary"]["ttft_ms"]["n"] == 4


def unreachable(n: int) -> dict[str, float]:
    """Times of run `n`, in ms: by so many magnitudes below real ones that two processes never differ by as many."""
    stage_ms = (1 + n / 10) * 1e-20
    return {
        **dict.fromkeys(STAGES, stage_ms),
        "ttft_ms": stage_ms * len(STAGES),
        "answer_ms": 2 * stage_ms * len(STAGES),
    }


def test_comparison_with_another_machine_warns(measured: subprocess.CompletedProcess, model: Path) -> None:
    """The earlier report gets times that no machine reaches, on another chip: whatever is measured now is slower."""
    report = json.loads((model.parent / "b.json").read_text())
    report["environment"]["chip"] = "Apple M9"
    for process in report["configurations"][0]["processes"]:
        process["runs"] = [{**run, **unreachable(n)} for n, run in enumerate(process["runs"] * 3)]
    (model.parent / "old.json").write_text(json.dumps(report))
    words = ("--runs", 3, "--warmup", 0, "--processes", 2, "--max-tokens", 1, "--kv-bits", 8, "--json", "-")
    done = bench(model, *words, "--compare", "old.json", "--fail-above", 50, cwd=model.parent)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["configurations"][0]["kv_bits"] == 8
    comparison = report["comparison"]
    assert "model: kv_bits was None, is 8" in comparison["warnings"]
    assert any(text.startswith("chip was Apple M9, is ") for text in comparison["warnings"])
    assert comparison["configurations"]["model"]["ttft_ms"]["verdict"] == "slower"
    assert "TTFT is slower by" in done.stderr


def test_estimates_need_no_measurement(model: Path) -> None:
    done = bench(model, "--estimate", "m4,A18 Pro", "--json", "e.json", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("An estimate from peak rates")
    report = json.loads((model.parent / "e.json").read_text())
    assert [one["chip"] for one in report["estimates"]] == ["M4", "A18 Pro"]
    assert all(one["estimate"] is True for one in report["estimates"])
    assert "M5 Max" in bench("--estimate", "list", cwd=model.parent).stdout


def test_estimates_count_the_package_as_the_architecture(model: Path) -> None:
    from fastvlm.models.random_checkpoint import TINY_ENCODER
    from fastvlm.runtime.estimate.work import encoder_cost, folder_work

    of_package, of_architecture = folder_work(model).encoder, encoder_cost(TINY_ENCODER, 256, bits=8)
    assert of_package.flops == of_architecture.flops
    assert of_package.moved_elements == of_architecture.moved_elements


def test_bad_requests_are_told_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    assert_one_line_error(bench(model, "--image-size", 512, cwd=tmp_path), "for 256 pixels", "--image-size")
    assert_one_line_error(bench(model, "--plot", "p.jpg", cwd=tmp_path), "ends in .png")
    (tmp_path / "old.json").write_text('{"schema": "other"}')
    assert_one_line_error(bench(model, "--compare", "old.json", cwd=tmp_path), "got 'other'")
    assert_one_line_error(bench(model, "--estimate", "M99", cwd=tmp_path), "unknown chip 'M99'")
    assert bench("--prompt-tokens", "many", model, cwd=tmp_path).returncode == 2
    assert bench(cwd=tmp_path).returncode == 2


def test_a_damaged_folder_leaves_no_report(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"")
    done = bench(broken, "--json", "b.json", cwd=tmp_path)
    assert done.returncode == 1
    assert "does not match its manifest" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "b.json").exists()
