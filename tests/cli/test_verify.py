"""`fastvlm verify` as a user types it, and `doctor --deep`: the tables, the JSON and the exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from fastvlm.cli import doctor as doctor_module
from fastvlm.cli.doctor import doctor_command
from fastvlm.cli.verify import judgement_table, print_table
from fastvlm.export.judge import Judgement
from fastvlm.runtime import doctor as findings_module
from fastvlm.runtime.doctor import Finding
from fastvlm.runtime.on_device import BASELINE, EXACT, DeviceRun, DeviceVerification, Way


def test_exit_code_is_the_verdict(
    fastvlm: Callable, here: Callable, model: Path, tmp_path: Path, write_checkpoint: Callable
) -> None:
    good = fastvlm("verify", model, "--against", "random:tiny", cwd=tmp_path)
    assert (good.returncode, good.stdout.splitlines()[-1]) == (0, "passed")
    assert "the first image, dB: float16 " in good.stdout and ", float16-accumulate " in good.stdout

    def change(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= -1

    bad = here("verify", model, "--against", write_checkpoint(change=change), "--json", cwd=tmp_path)
    assert bad.returncode == 1
    result = json.loads(bad.stdout)
    assert result["passed"] is False
    assert result["failures"][0].startswith("language_model.model.layers.0.mlp.up_proj.weight must keep")
    assert result["failures"][1].startswith("logits reach")


ENGINE = DeviceRun(
    Way("coreml", "CPU_AND_NE"), True, None, None, True, 48.2, 0.999993, 640.0, 41_000.0, 88.0, 61.5, engine_share=0.991
)
ABORTED = DeviceRun(Way("coreml", "ALL"), error="Core ML: its process was ended by SIGABRT", signal="SIGABRT")


def verification(*runs: DeviceRun) -> DeviceVerification:
    first = DeviceRun(BASELINE, finite=True, load_ms=1000.0, first_ms=900.0, warm_ms=500.0)
    return DeviceVerification("model", "shapes.png", 125_000_000, (first, *runs), ())


def test_table_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(verification(ENGINE, ABORTED))
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("CPU_AND_NE (default)")]
    assert row.split() == [
        *("CPU_AND_NE", "(default)", "agrees", "48.2", "dB", "0.999993"),
        *("640", "ms", "88", "ms", "62", "ms", "99.1%"),
    ]
    assert "crashed with SIGABRT" in shown and "ALL: Core ML: its process was ended by SIGABRT" in shown
    assert "note: ALL does not work here (crashed with SIGABRT). Do not choose it" in shown
    assert shown.splitlines()[-1].startswith("passed: CPU_AND_NE")


def test_table_ends_with_why_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(verification(replace(ENGINE, snr_db=1.9, cosine=0.367)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "failed: CPU_AND_NE: wrong features (1.9 dB, the floor is 20 dB)"


def test_judgement_has_a_row_per_stage_and_a_verdict() -> None:
    rows = {"stem": 131.6, "output": 128.5}
    both = {"float32": rows, "float16": {"stem": 61.1, "output": 58.8}}
    ours = {**both, "float16": {"stem": 63.9, "output": 61.2}, "float16-accumulate": {"stem": 61.2, "output": 58.9}}
    floors = dict.fromkeys(rows, 65.0)
    seconds = {"float32": 1.0, "float16": 2.0}
    found = Judgement(
        image_size=256, saved_size=256, executor=ours, executor_floors_db=floors, judge=both, seconds=seconds
    )
    lines = judgement_table(found).splitlines()
    assert lines[2].split() == ["stem", "131.6", "131.6", "63.9", "61.2", "61.1"]
    assert lines[3].split() == ["output", "128.5", "128.5", "61.2", "58.9", "58.8"]
    assert "Not judged" in lines[-2] and lines[-1].startswith("passed")
    worse = replace(found, judge={**both, "float32": {"stem": 12.0, "output": 5.0}})
    assert judgement_table(worse).splitlines()[-1].startswith("failed: Core AI in float32 reaches 12.0 dB at stem")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["verify", "model"], "--against"),
        (["verify", "model", "--on-device", "--images", "."], "--images"),
        (["verify", "model", "--on-device", "--judge", "coreai"], "--judge"),
        (["verify", "model", "--judge", "coreai"], "--judge"),
        (["verify", "model", "--against", "tiny", "--judge-size", "128"], "--judge-size"),
    ],
)
def test_verify_without_a_comparison_is_a_usage_error(
    here: Callable, words: list[str], named: str, tmp_path: Path
) -> None:
    done = here(*words, cwd=tmp_path)
    assert done.returncode == 2 and named in done.stderr


@pytest.mark.slow
def test_model_that_is_nothing_is_one_line(here: Callable, tmp_path: Path) -> None:
    done = here("verify", "nothing-here", "--on-device", cwd=tmp_path)
    assert done.returncode == 1
    assert next(line for line in done.stderr.splitlines() if "nothing-here" in line).startswith("error: ")


def test_deep_doctor_runs_nothing_while_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings_module, "examine", lambda: [Finding("mlx", "missing", "not installed", "install it")])
    monkeypatch.setattr(doctor_module, "embedded_on_device", lambda: pytest.fail("it was run"))
    with pytest.raises(typer.Exit) as ending:
        doctor_command(deep=True)
    assert ending.value.exit_code == 1
    assert "install what is missing first" in capsys.readouterr().out


@pytest.mark.parametrize(("snr_db", "code"), [(48.2, 0), (1.9, 1)])
def test_deep_doctor_judges_the_default(
    snr_db: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings_module, "examine", lambda: [Finding("mlx", "ok", "0.32")])
    monkeypatch.setattr(doctor_module, "embedded_on_device", lambda: verification(replace(ENGINE, snr_db=snr_db)))
    with pytest.raises(typer.Exit) as ending:
        doctor_command(deep=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert ending.value.exit_code == code
    assert found["on_device"]["passed"] is (code == 0) and found["findings"][0]["subject"] == "mlx"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="the two modes of the executor, which stand in for Core ML")
def test_executor_is_verified_off_a_mac(here: Callable, model: Path) -> None:
    done = here("verify", str(model), "--on-device", "--json", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    runs = {run["label"]: run for run in found["on_device"]["runs"]}
    assert list(runs) == [BASELINE.label, EXACT.label]
    assert found["passed"] and runs[EXACT.label]["default"]
    assert 45 < runs[EXACT.label]["snr_db"] < 100  # float16's rounding, and not none
    assert "a Mac only" in found["on_device"]["missing"][0]
    assert any("do not predict those of FastViTHD" in note for note in found["on_device"]["notes"])


@pytest.mark.slow
def test_checkpoint_and_device_are_verified_together(here: Callable, model: Path) -> None:
    done = here("verify", str(model), "--against", "random:tiny", "--on-device", "--json", cwd=model.parent)
    found = json.loads(done.stdout)
    assert {"image_features", "logits", "on_device", "passed", "failures"} <= set(found)
    assert done.returncode == 0 and found["passed"]


@pytest.mark.slow
def test_deep_doctor_runs_the_embedded_model(here: Callable, tmp_path: Path) -> None:
    done = here("doctor", "--deep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "executor, float16" in done.stdout and "passed: " in done.stdout
    assert list(tmp_path.iterdir()) == []
