"""Commands whose encoder has a process of its own: answers, signals, crashes and what is left of them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvlm.cli.progress import LoadProgress

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).resolve().parents[2] / "runtime" / "samples" / "shapes.png"
CHILD = Path(__file__).resolve().parents[1] / "runtime" / "bad_child.py"

BAD = """
import sys
from fastvlm.runtime import fastvlm as model
from fastvlm.runtime.encoder_process import EncoderProcess
model.check_mac = lambda: None
EncoderProcess.__init__.__kwdefaults__["program"] = (sys.argv[1], sys.argv[2], sys.argv[3], "-")
sys.argv[1:4] = []
from fastvlm.cli.main import main
main()
"""
"""`fastvlm` with a child that goes wrong in place of Core ML's."""


def bad_command(fault: str, when: str, *words: object) -> list[str]:
    command = (sys.executable, "-c", BAD, CHILD, fault, when, *words, "--backend", "coreml")
    return [str(word) for word in command]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants_of(pid: int) -> list[int]:
    """The children of a process: here the encoder's and its guard."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def test_answers_are_those_of_an_encoder_in_process(model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fastvlm.cli.main", "generate", str(model), "-i", str(SAMPLE), "-p", "Describe.",
             "--backend", "reference", "--max-tokens", "6", "--ignore-eos", "--json"]  # fmt: skip
    found = []
    for extra in ([], ["--encoder-process"]):
        done = subprocess.run([*words, *extra], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads(done.stdout))
    assert found[0]["token_ids"] == found[1]["token_ids"]
    assert found[1]["timings"]["encode_ms"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["load", "1"])
def test_signal_ends_all_while_native_code_holds_the_gil(model: Path, when: str, number: signal.Signals) -> None:
    command = bad_command("hang", when, "generate", model, "-i", SAMPLE, "-p", "Hi")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: list[int] = []
    end = time.monotonic() + 120
    while len(family) < 2 and time.monotonic() < end:
        family = descendants_of(process.pid)
        time.sleep(0.02)
    time.sleep(3.0)  # past the imports: the child hangs
    assert all(map(is_running, family))
    start = time.monotonic()
    process.send_signal(number)
    while any(map(is_running, family)):
        assert time.monotonic() - start < 0.5
        time.sleep(0.002)
    _, said = process.communicate(timeout=60)  # Python's own end is as long as without a child
    assert process.returncode == 128 + number
    assert said.endswith("error: interrupted\n")


def test_crash_names_options_and_exits_with_1(model: Path) -> None:
    command = bad_command("abort", "load", "generate", model, "-i", SAMPLE, "-p", "Hi", "--compute-units", "ALL")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: Core ML: its process was ended by SIGABRT while it loaded the package on ALL \(its last output: "
        r'"MPSGraph: error: MLIR pass manager failed"\)\. Try --compute-units CPU_ONLY, and find the units that work '
        rf"with fastvlm verify {re.escape(str(model))} --on-device\.\n",
        done.stderr,
    )


def test_wait_is_a_line_for_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadProgress() as progress:
        for seconds in range(2, 25):
            progress("Compiling", float(seconds))
    assert capsys.readouterr().err == "  Compiling 2 s\n  Compiling 12 s\n  Compiling 22 s\n"


def test_wait_is_updated_in_place_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    code = (
        "from fastvlm.cli.progress import LoadProgress\n"
        "with LoadProgress() as progress: progress('Compiling', 2.0); progress('Compiling', 3.0)"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == "\r\x1b[K  Compiling 2 s\r\x1b[K  Compiling 3 s\r\n"
