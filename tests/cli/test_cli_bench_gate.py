"""What `fastvlm bench` refuses and judges, in this process and on times that tests choose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm.cli import bench as command
from fastvlm.cli.main import app
from fastvlm.models.errors import UsageError
from fastvlm.runtime.benchmark import run as measuring
from fastvlm.runtime.benchmark.report import Benchmark, Configuration, Process, Run

STEADY = (30.0, 30.4, 30.2, 30.6, 30.1)


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
    """Stands in for the measurement: gives `now`, and notes what it was asked."""

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
    return invoke("m", "--compare", tmp_path / "old.json", "--fail-above", 5, "--json", tmp_path / "new.json")


def test_a_gate_without_an_earlier_report_is_wrong_usage(measured: Measured, tmp_path: Path) -> None:
    assert invoke("m", "--fail-above", 5).exit_code == 2
    (tmp_path / "old.json").write_text(json.dumps(benchmark(configuration("m")).as_dict()))
    for limit in ("nan", "inf", "-1"):
        assert invoke("m", "--compare", tmp_path / "old.json", "--fail-above", limit).exit_code == 2
    assert measured.workload is None  # told before anything is measured
    done = invoke("m", "--compare", tmp_path / "old.json", "--fail-above", 5, "--processes", 1)
    assert isinstance(done.exception, UsageError) and "--processes 2" in str(done.exception)


def test_a_gate_passes_what_is_no_slower_and_fails_what_is(measured: Measured, tmp_path: Path) -> None:
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
def test_a_gate_that_could_not_compare_every_row_fails(
    measured: Measured, tmp_path: Path, now: tuple[str, ...], old: tuple[str, ...], said: str
) -> None:
    done = gate(measured, tmp_path, benchmark(*map(configuration, now)), benchmark(*map(configuration, old)))
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert json.loads((tmp_path / "new.json").read_text())["comparison"]["unmatched"]  # what was measured is kept


@pytest.mark.parametrize("few", [{"processes": 1}, {"runs": 2}])
def test_a_gate_with_too_little_to_judge_fails(measured: Measured, tmp_path: Path, few: dict[str, int]) -> None:
    old = benchmark(configuration("m", **few))
    done = gate(measured, tmp_path, benchmark(configuration("m", factor=1.5, **few)), old)
    assert isinstance(done.exception, UsageError), done.output
    assert "two processes and five runs" in str(done.exception)


def test_an_empty_prompt_is_asked_as_such(measured: Measured) -> None:
    assert invoke("m", "--prompt", "").exit_code == 0
    assert measured.workload.prompt == ""
    assert invoke("m").exit_code == 0
    assert measured.workload.prompt == "Describe the image."


def test_an_estimate_refuses_what_it_does_not_use() -> None:
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


def test_an_estimate_counts_the_scheme() -> None:
    """On an M4, whose engine does twice as much in int8; in fewer bits where it is the memory that bounds."""
    found = {}
    for scheme in ("fp16", "int8", "pal4", "w8a8"):
        done = invoke("random:tiny", "--image-size", 256, "--quant", scheme, "--estimate", "M4", "--json", "-")
        (found[scheme],) = json.loads(done.stdout)["estimates"]
        assert scheme in found[scheme]["label"]
    assert found["fp16"]["encode_ms"] > found["int8"]["encode_ms"] > found["pal4"]["encode_ms"]
    mixed = invoke("random:tiny", "--quant", "mixed", "--estimate", "M4")
    assert mixed.exit_code == 2
    assert "estimate the folder" in " ".join(mixed.output.replace("│", " ").split())
