"""`make mac-check`: no step stops another, every ending is reported, and the whole of it runs off a Mac too."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "mac_check.py"

STEPS = {
    "fine": "print('loading'); print('{\"answer\": 42}')",
    "silent": "",
    "exits": "import sys; print('{\"half\": 1}'); sys.exit('error: it does not work')",
    "aborts": "import os, sys; print('failed assertion', file=sys.stderr, flush=True); os.abort()",
    "segfaults": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "impossible": 'print(\'{"not_possible": "no engine"}\')',
    "wrong": 'print(\'{"failed": "12 dB", "snr_db": 12}\')',
    "hangs": """
import subprocess, time
subprocess.Popen(["sleep", "50.125"])
print('{"begun": 1}', flush=True)
time.sleep(50)
""",
}
"""Scripts in place of `mac_steps.py`, which end in every way that a step can."""


@pytest.fixture
def mac_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("mac_check")


@pytest.fixture
def run(mac_check: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Runs one of STEPS as a step."""

    def run_step(name: str, limit_s: float = 30.0) -> Any:
        script = tmp_path / f"{name}.py"
        script.write_text(STEPS[name])
        return mac_check.run(mac_check.Step(name, name, 30, script=str(script)), limit_s, tmp_path)

    return run_step


@pytest.mark.parametrize(
    ("name", "status", "reason", "result"),
    [
        ("fine", "ok", "", {"answer": 42}),
        ("silent", "failed", "exit code 0", {}),
        ("exits", "failed", "error: it does not work", {"half": 1}),
        ("aborts", "failed", "crashed with SIGABRT", {}),
        ("segfaults", "failed", "crashed with SIGSEGV", {}),
        ("impossible", "not possible", "no engine", {"not_possible": "no engine"}),
        ("wrong", "failed", "12 dB", {"failed": "12 dB", "snr_db": 12}),
    ],
)
def test_ending_of_a_step_is_reported(run: Callable, name: str, status: str, reason: str, result: dict) -> None:
    outcome = run(name)
    assert (outcome.status, outcome.reason, outcome.result) == (status, reason, result)


def test_step_that_hangs_is_killed_with_its_children(run: Callable) -> None:
    begin = time.monotonic()
    outcome = run("hangs", limit_s=1.5)
    assert (outcome.status, outcome.reason, outcome.result) == ("timeout", "not done after 2 s", {"begun": 1})
    assert time.monotonic() - begin < 20
    left = subprocess.run(["pgrep", "-f", "sleep 50.125"], capture_output=True, text=True).stdout.split()
    assert left == []


def test_step_without_a_program_is_reported(mac_check: ModuleType, tmp_path: Path) -> None:
    step = mac_check.Step("gone", "gone", 5, python=str(tmp_path / "python"))
    assert mac_check.run(step, 5, tmp_path).status == "failed"


def test_steps_beyond_the_half_hour_are_left_out(run: Callable) -> None:
    outcome = run("fine", limit_s=0.5)
    assert (outcome.status, outcome.reason) == ("left out", "the half hour was over")


def test_both_files_are_there_after_every_step(mac_check: ModuleType, run: Callable, tmp_path: Path) -> None:
    check = mac_check.Check(tmp_path, {"model": "tiny"})
    for count, name in enumerate(("fine", "aborts", "impossible"), start=1):
        check.add(run(name))
        found = json.loads((tmp_path / "mac-check.json").read_text())
        assert found["schema"] == mac_check.SCHEMA and len(found["steps"]) == count
        assert f"| {name} |" in (tmp_path / "mac-check.md").read_text()
    text = (tmp_path / "mac-check.md").read_text()
    assert "crashed with SIGABRT" in text and "failed assertion" in text and "no engine" in text


def test_every_step_of_a_mac_has_a_body_and_a_table(mac_check: ModuleType, tmp_path: Path) -> None:
    bodies, shown = importlib.import_module("mac_steps").STEPS, importlib.import_module("mac_report").SHOWN
    for step in mac_check.steps(tmp_path, "random:0.5b", quick=False):
        name = step.name if step.name in bodies else step.name.rpartition("-")[0]
        assert name in bodies or step.script == "after_answer.py" or step.impossible, step.name
        assert name in shown or name in ("venv", "app")
    assert len({step.name for step in mac_check.steps(tmp_path, "tiny", quick=False)}) == len(
        mac_check.steps(tmp_path, "tiny", quick=False)
    )


def test_every_python_is_waited_with(mac_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    other, absent = [version for version in mac_check.PYTHONS if version != here]
    monkeypatch.setattr(mac_check, "interpreter", lambda version: "/bin/python" if version == other else None)
    monkeypatch.setattr(mac_check.sys, "platform", "darwin")
    steps = {step.name: step for step in mac_check.after_answer_steps(tmp_path, "tiny", quick=False)}
    assert steps[f"after-answer-{here}"].python == sys.executable
    assert steps[f"after-answer-{other}"].python == str(tmp_path / f"venv-{other}" / "bin" / "python")
    assert steps[f"venv-{other}"].arguments[0] == "/bin/python"
    assert steps[f"after-answer-{absent}"].impossible == f"Python {absent} is not installed"


def test_shim_is_not_an_interpreter(mac_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shim = tmp_path / "python3.98"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mac_check.interpreter("3.98") is None
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / f"python{here}").symlink_to(sys.executable)
    assert mac_check.interpreter(here) == str(tmp_path / f"python{here}")


def test_only_takes_what_its_steps_need(mac_check: ModuleType, tmp_path: Path) -> None:
    every = mac_check.steps(tmp_path, "random:0.5b", quick=True)
    assert [step.name for step in mac_check.chosen(every, "decode")] == ["export-model", "decode"]
    assert [step.name for step in mac_check.chosen(every, "damaged,environment")] == [
        "environment",
        "export-tiny",
        "damaged",
    ]
    with pytest.raises(SystemExit, match="no step is called nonsense"):
        mac_check.chosen(every, "nonsense")


def test_report_names_neither_user_nor_machine(mac_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac_check.Path, "home", lambda: Path("/Users/ada"))
    monkeypatch.setattr(mac_check.os, "uname", lambda: SimpleNamespace(nodename="Adas-Mac.local"))
    text = json.dumps({"path": "/Users/ada/model", "said": "no /Users/ada/x on Adas-Mac.local"})
    assert json.loads(mac_check.anonymous(text)) == {"path": "~/model", "said": "no ~/x on this-machine"}


def test_text_of_any_origin_stays_in_its_cell(mac_check: ModuleType) -> None:
    report = importlib.import_module("mac_report")
    assert report.cell("a | b\nc <script>") == "a / b c &lt;script&gt;"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_check_leaves_a_report(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(SCRIPT), "--out", "out", "--quick", "--only", "environment,units-tiny"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        report = tmp_path / "out" / "mac-check.json"
        while not report.is_file():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(report.read_text())
    assert found["interrupted"] and found["steps"][0]["name"] == "environment"
    assert "interrupted" in (tmp_path / "out" / "mac-check.md").read_text()
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="here the stand-ins are tried; a Mac runs the real steps")
def test_whole_check_runs_off_a_mac(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", "out", "--quick", "--model", "random:tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "mac-check.json").read_text())
    status = {step["name"]: step["status"] for step in found["steps"]}
    assert {name for name, one in status.items() if one not in ("ok", "not possible")} == set()
    assert {name for name, one in status.items() if one == "not possible"} >= {"placement", "app"}
    by_name = {step["name"]: step["result"] for step in found["steps"]}
    assert by_name["units-tiny"]["passed"] and len(by_name["units-tiny"]["runs"]) == 2
    assert by_name["damaged"]["exit_code"] == 1 and by_name["damaged"]["said"][-1].startswith("error: ")
    assert len(by_name["load-times"]["runs"]) == 3
    assert by_name["decode"]["ours"]["decode_tps"] > 0 and by_name["decode"]["same_ids"] > 0
    assert by_name["bench"]["report"]["configurations"][0]["processes"]
    text = (tmp_path / "out" / "mac-check.md").read_text()
    assert "this is not a Mac" in text and "## By hand: Apple's app" in text
    assert re.search(r"decoding at \d+\.\d\d x mlx-lm's rate", text)
