"""`fastvlm bench` as a user types it: measurements, its judgement on chosen times, and estimates."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm.cli import bench as command
from fastvlm.cli.main import app
from fastvlm.cli.outputs import check_pictures, check_reports, check_tables
from fastvlm.export import exporter
from fastvlm.models.errors import UsageError
from fastvlm.runtime.benchmark import run as measuring
from fastvlm.runtime.benchmark.report import Benchmark, Configuration, Process, Run
from fastvlm.runtime.benchmark.workload import SAMPLE

STAGES = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms", "sample_ms")
STEADY = (30.0, 30.4, 30.2, 30.6, 30.1)


@pytest.fixture(scope="module")
def finished(fastvlm: Callable, model: Path) -> subprocess.CompletedProcess:
    """One benchmark with everything that can be written."""
    words = ("--runs", 2, "--warmup", 0, "--processes", 2, "--max-tokens", 4, "--published")
    return fastvlm(
        "bench", model, *words, "--report", "b.json", "--markdown", "b.md", "--plot", "b.png", cwd=model.parent
    )


def test_tables_go_to_stdout_and_progress_to_stderr(finished: subprocess.CompletedProcess, model: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == (model.parent / "b.md").read_text()
    for word in ("encode", "prefill", "**TTFT**", "decode, ms per token (", "- machine: ", "random weights"):
        assert word in finished.stdout
    assert "Not measured here: FastVLM paper" in finished.stdout
    assert "  model (2 of 2)" in finished.stderr
    assert "note: random weights: the text means nothing" in finished.stderr
    assert (model.parent / "b.png").read_bytes().startswith(b"\x89PNG")


def test_written_files_may_be_overwritten(finished: subprocess.CompletedProcess, model: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    check_reports(model.parent / "b.json")
    check_tables(model.parent / "b.md")
    check_pictures(model.parent / "b.png")


def test_report_separates_cold_and_warm_runs(finished: subprocess.CompletedProcess, model: Path) -> None:
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
    """Returns the times of run `n` in ms, so far below real ones that two processes never differ by as much."""
    stage_ms = (1 + n / 10) * 1e-20
    return {
        **dict.fromkeys(STAGES, stage_ms),
        "ttft_ms": stage_ms * len(STAGES),
        "answer_ms": 2 * stage_ms * len(STAGES),
    }


def test_comparison_with_another_machine_warns(
    here: Callable, finished: subprocess.CompletedProcess, model: Path
) -> None:
    """The earlier report gets impossible times of another chip, so that any new measurement is slower."""
    report = json.loads((model.parent / "b.json").read_text())
    report["environment"]["chip"] = "Apple M9"
    for process in report["configurations"][0]["processes"]:
        process["runs"] = [{**run, **unreachable(n)} for n, run in enumerate(process["runs"] * 3)]
    (model.parent / "old.json").write_text(json.dumps(report))
    words = ("--runs", 3, "--warmup", 0, "--processes", 2, "--max-tokens", 1, "--kv-bits", 8, "--json")
    done = here("bench", model, *words, "--compare", "old.json", "--fail-above", 50, cwd=model.parent)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["configurations"][0]["kv_bits"] == 8
    comparison = report["comparison"]
    assert "model: kv_bits was None, is 8" in comparison["warnings"]
    assert any(text.startswith("chip was Apple M9, is ") for text in comparison["warnings"])
    assert comparison["configurations"]["model"]["ttft_ms"]["verdict"] == "slower"
    assert "TTFT is slower by" in done.stderr


def test_bad_requests_are_reported_before_measuring(
    here: Callable, one_line_error: Callable, model: Path, tmp_path: Path
) -> None:
    one_line_error(here("bench", model, "--image-size", 512, cwd=tmp_path), "for 256 pixels", "--image-size")
    one_line_error(here("bench", model, "--plot", "p.jpg", cwd=tmp_path), "ends in .png")
    (tmp_path / "old.json").write_text('{"schema": "other"}')
    one_line_error(here("bench", model, "--compare", "old.json", cwd=tmp_path), "got 'other'")
    one_line_error(here("bench", model, "--estimate", "M99", cwd=tmp_path), "unknown chip 'M99'")
    assert here("bench", "--prompt-tokens", "many", model, cwd=tmp_path).returncode == 2
    assert here("bench", cwd=tmp_path).returncode == 2


def test_damaged_folder_leaves_no_report(here: Callable, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"")
    done = here("bench", broken, "--report", "b.json", cwd=tmp_path)
    assert done.returncode == 1
    assert "does not match its manifest" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "b.json").exists()


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def configuration(label: str, processes: int = 2, factor: float = 1.0, runs: int = 5) -> Configuration:
    one = Process(9.0, 0.0, None, None, 0, tuple(Run(1, factor * ms, 1, 9, 1, None, 1, 99) for ms in STEADY[:runs]))
    sizes = {"encoder": 1, "decoder": 1, "other": 1}
    folder = {"path": "m", "trained": True, "source": None, "recipe": None}
    return Configuration(label, folder, "reference", None, None, "cpu", 256, 16, 42, 0, sizes, (), (one,) * processes)


def benchmark(*found: Configuration) -> Benchmark:
    image = {"name": "i.png", "width": 8, "height": 8, "sha256": "0" * 64}
    workload = {"image": image, "prompt": "?", "max_tokens": 1, "warmup": 0}
    return Benchmark("2026-01-02T03:04:05+00:00", {"chip": "M4", "cores": 1, "load_average": 0.0}, workload, found)


class Measured:
    """A measurement that returns `now`, and records its workload."""

    now = benchmark(configuration("m"))
    workload: Any = None

    def __call__(self, cases: object, workload: object, **options: object) -> Benchmark:
        self.workload = workload
        return self.now


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    @contextmanager
    def prepared(*_: object) -> Iterator[list[object]]:
        yield []

    stand_in = Measured()
    monkeypatch.setattr(command, "prepared", prepared)
    monkeypatch.setattr(measuring, "benchmark", stand_in)
    return stand_in


def gate(measured: Measured, tmp_path: Path, now: Benchmark, old: Benchmark) -> Result:
    measured.now = now
    (tmp_path / "old.json").write_text(json.dumps(old.as_dict()))
    return invoke("m", "--compare", tmp_path / "old.json", "--fail-above", 5, "--report", tmp_path / "new.json")


@pytest.mark.slow
def test_gate_without_an_earlier_report_is_wrong_usage(measured: Measured, tmp_path: Path) -> None:
    assert invoke("m", "--fail-above", 5).exit_code == 2
    (tmp_path / "old.json").write_text(json.dumps(benchmark(configuration("m")).as_dict()))
    for limit in ("nan", "inf", "-1"):
        assert invoke("m", "--compare", tmp_path / "old.json", "--fail-above", limit).exit_code == 2
    assert measured.workload is None  # reported before anything is measured
    done = invoke("m", "--compare", tmp_path / "old.json", "--fail-above", 5, "--processes", 1)
    assert isinstance(done.exception, UsageError) and "processes=2" in str(done.exception)


def test_gate_fails_only_slower_rows(measured: Measured, tmp_path: Path) -> None:
    same = gate(measured, tmp_path, benchmark(configuration("m")), benchmark(configuration("m")))
    assert (same.exit_code, same.exception) == (0, None), same.output
    slower = gate(measured, tmp_path, benchmark(configuration("m", factor=1.5)), benchmark(configuration("m")))
    assert slower.exit_code == 1
    assert "TTFT is slower by" in slower.output


@pytest.mark.parametrize(
    ("now", "old", "said"),
    [
        (("a", "b"), ("c", "d"), "a is in only one of the two reports; b is in only one"),
        (("a", "b"), ("a",), "b is in only one"),
        (("a",), ("a", "b"), "b is in only one"),
    ],
)
def test_gate_fails_when_a_row_has_no_counterpart(
    measured: Measured, tmp_path: Path, now: tuple[str, ...], old: tuple[str, ...], said: str
) -> None:
    done = gate(measured, tmp_path, benchmark(*map(configuration, now)), benchmark(*map(configuration, old)))
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert json.loads((tmp_path / "new.json").read_text())["comparison"]["unmatched"]  # what was measured is kept


@pytest.mark.parametrize("few", [{"processes": 1}, {"runs": 2}])
def test_gate_fails_with_too_few_runs(measured: Measured, tmp_path: Path, few: dict[str, int]) -> None:
    old = benchmark(configuration("m", **few))
    done = gate(measured, tmp_path, benchmark(configuration("m", factor=1.5, **few)), old)
    assert isinstance(done.exception, UsageError), done.output
    assert "two processes and five runs" in str(done.exception)


def test_empty_prompt_is_not_the_default(measured: Measured) -> None:
    assert invoke("m", "--prompt", "").exit_code == 0
    assert measured.workload.prompt == ""
    assert invoke("m").exit_code == 0
    assert measured.workload.prompt == "Describe the image."


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("random:tiny", "nope"), "nope is neither a folder nor one of"),
        (("random:tiny", "--image-size", "128,100"), "100"),
    ],
)
def test_all_models_are_checked_before_an_export(
    words: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    monkeypatch.setattr(exporter, "export", lambda *words, **options: exported.append(words))
    found = CliRunner().invoke(app, ["bench", *words])
    assert problem in str(found.exception)
    assert exported == []


def test_estimate_is_printed_and_reported(model: Path, tmp_path: Path) -> None:
    done = invoke(model, "--estimate", "m4,A18 Pro", "--report", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("An estimate from peak rates")
    report = json.loads((tmp_path / "e.json").read_text())
    assert [one["chip"] for one in report["estimates"]] == ["M4", "A18 Pro"]
    assert all(one["estimate"] is True for one in report["estimates"])
    assert "M5 Max" in invoke("--estimate", "list").stdout


def test_package_and_architecture_give_the_same_work(model: Path) -> None:
    from fastvlm.models.random_checkpoint import TINY_ENCODER
    from fastvlm.runtime.estimate.work import encoder_cost, folder_work

    of_package, of_architecture = folder_work(model).encoder, encoder_cost(TINY_ENCODER, 256, bits=8)
    assert of_package.flops == of_architecture.flops
    assert of_package.moved_elements == of_architecture.moved_elements


def test_options_of_a_measurement_are_refused() -> None:
    options = ("--compare", "no.json", "--fail-above", 3, "--runs", 5, "--image", "x.png", "--kv-bits", 8)
    done = invoke("tiny", *options, "--estimate", "M4")
    assert done.exit_code == 2
    for option in options[::2]:
        assert str(option) in done.output
    assert "--prompt-tokens" not in done.output
    done = invoke("tiny", "--quant", "pal4", "--estimate", "list")
    assert done.exit_code == 2
    assert "FOLDER" in done.output and "--quant" in done.output
    assert invoke("--estimate", "list").exit_code == 0
    assert invoke("tiny", "--prompt-tokens", 64, "--estimate", "M4").exit_code == 0


def test_scheme_changes_the_estimate() -> None:
    """On an M4, whose engine is twice as fast in int8. Fewer bits help where memory is the bound."""
    found = {}
    for scheme in ("fp16", "int8", "pal4", "w8a8"):
        done = invoke("random:tiny", "--image-size", 256, "--quant", scheme, "--estimate", "M4", "--json")
        (found[scheme],) = json.loads(done.stdout)["estimates"]
        assert scheme in found[scheme]["label"]
    assert found["fp16"]["encode_ms"] > found["int8"]["encode_ms"] > found["pal4"]["encode_ms"]
    mixed = invoke("random:tiny", "--quant", "mixed", "--estimate", "M4")
    assert mixed.exit_code == 2
    assert "estimate the folder" in " ".join(mixed.output.replace("│", " ").split())


def test_published_is_refused_with_an_estimate() -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", "--published"])
    assert found.exit_code == 2
    assert "leave out --published" in found.stderr


@pytest.mark.parametrize(("words", "tokens"), [((), 46), (("--prompt-tokens", "64"), 64)])
def test_assumed_prompt_length_is_printed(words: tuple[str, ...], tokens: int) -> None:
    found = CliRunner().invoke(app, ["bench", "random:tiny", "--estimate", "M4", *words])
    assert found.exit_code == 0, found.stderr
    assert "an image and 30 tokens of text, unless --prompt-tokens" in found.stdout
    assert f"{tokens} prompt tokens |" in found.stdout


@pytest.mark.slow
def test_captions_are_measured_and_reported(here: Callable, model: Path, tmp_path: Path) -> None:
    words = ("--captions", SAMPLE.parent, "--runs", 2, "--max-tokens", 2, "--encoder-process", "--report", "r.json")
    done = here("bench", model, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 images, " in done.stdout and " of the slowest stage" in done.stdout
    assert "  model (2 of 2)" in done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    (found,) = report["configurations"]
    assert (report["schema"], found["encoder"]) == ("fastvlm.captions-benchmark/1", "reference process")
    assert set(found["images_per_second"]) == {"decode", "encode", "answer"}
    assert min(found["pipeline"], *found["images_per_second"].values()) > 0
    check_reports(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--captions", "x", "--plot", "a.png", "--processes", "2"), "leave out --processes, --plot"),
        (("--encoder-process",), "needs --captions IMAGES"),
    ],
)
def test_options_that_captions_do_not_use_are_refused(words: tuple[str, ...], problem: str) -> None:
    found = CliRunner().invoke(app, ["bench", "tiny", *words])
    assert found.exit_code == 2
    assert problem in " ".join(found.stderr.replace("│", " ").split())
