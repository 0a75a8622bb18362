"""`make mac-check`: everything that only a Mac can show, in half an hour, as two files to attach to an issue.

    python tests/mac/mac_check.py [--out mac-check] [--model random:0.5b] [--quick] [--only STEP,...]

Each step runs in a process of its own with a limit of its own, so one that crashes or hangs does not stop the others.
Both files are written anew after every step. Nothing is sent anywhere. Off a Mac each step runs its stand-in, and the
report lists what was not possible.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from mac_report import markdown  # noqa: E402

SCHEMA = "fastvlm.mac-check/1"
TOTAL_SECONDS = 29 * 60
"""Of the whole check: steps that do not fit any more are left out."""

PYTHONS = ("3.11", "3.12", "3.13")
TAIL = 4_000
"""Characters of stderr that the report keeps, from its end."""

INTERRUPT = signal.SIGINT


@dataclass(frozen=True)
class Step:
    """One question to the machine."""

    name: str
    title: str
    limit_s: float
    arguments: tuple[str, ...] = ()
    """Of `mac_steps.py`, after the step's name."""
    python: str = sys.executable
    script: str = "mac_steps.py"
    impossible: str | None = None
    """Why it cannot run here; None when it can."""


@dataclass
class Outcome:
    """The outcome of a step. `status` is ok, failed, timeout, not possible or left out."""

    name: str
    title: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    stderr: str = ""
    exit_code: int | None = None


@dataclass
class Check:
    """The whole report."""

    out: Path
    options: dict[str, Any]
    begin: float = field(default_factory=time.monotonic)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    outcomes: list[Outcome] = field(default_factory=list)
    interrupted: bool = False

    @property
    def seconds_left(self) -> float:
        return TOTAL_SECONDS - (time.monotonic() - self.begin)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.write()

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": self.created,
            "options": self.options,
            "interrupted": self.interrupted,
            "seconds": round(time.monotonic() - self.begin, 1),
            "steps": [asdict(one) for one in self.outcomes],
        }

    def write(self) -> None:
        """Both files, whole or as they were."""
        whole = anonymous(json.dumps(self.as_dict(), indent=2, ensure_ascii=False))
        for name, text in (("mac-check.json", whole + "\n"), ("mac-check.md", markdown(json.loads(whole)))):
            partial = self.out / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mac-check"), help="the folder for both files")
    parser.add_argument("--model", default="random:0.5b", help="what placement and speed are measured on")
    parser.add_argument("--quick", action="store_true", help="few runs and no virtual environments")
    parser.add_argument("--only", default="", metavar="STEP,...", help="these steps alone, and what they need")
    parser.add_argument("--keep", action="store_true", help="keep the exported models")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    options = {"model": arguments.model, "quick": arguments.quick, "only": arguments.only}
    check = Check(out, options)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        run_all(check, chosen(steps(work, arguments.model, arguments.quick), arguments.only), work)
    except KeyboardInterrupt:
        check.interrupted = True
        check.write()
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    bad = [one for one in check.outcomes if one.status in ("failed", "timeout")]
    print(f"\n{out / 'mac-check.md'}\n{out / 'mac-check.json'}")
    print("Attach both files to an issue: they hold no serial numbers, and your home folder is shortened to ~.")
    sys.exit(128 + INTERRUPT if check.interrupted else 1 if bad else 0)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def steps(work: Path, model: str, quick: bool) -> list[Step]:
    """Every step in order: those that say most for the least time come first."""
    tiny, big = str(work / "tiny"), str(work / "model")
    few = ("--quick",) if quick else ()
    return [
        Step("environment", "Versions and hardware", 120),
        Step("export-tiny", "Export of tiny", 300, ("tiny", tiny)),
        Step("units-tiny", "Every compute unit, on tiny", 600, (tiny, *few)),
        *after_answer_steps(work, tiny, quick),
        Step("damaged", "A damaged compiled copy", 180, (tiny,)),
        Step("export-model", f"Export of {model}", 600, (model, big)),
        Step("units-model", f"Every compute unit, on {model}", 900, (big, *few)),
        Step("placement", f"Where Core ML places {model}", 300, (big,)),
        Step("load-times", f"Load and compile times of three runs, on {model}", 300, (big,)),
        Step("bench", f"Time to first token of {model}", 420, (big, *few)),
        Step("decode", "Decoding next to mlx-lm, the same weights", 300, (big, *few)),
        Step("app", "Apple's app in Xcode", 60, (tiny,)),
    ]


def after_answer_steps(work: Path, tiny: str, quick: bool) -> list[Step]:
    """Waiting after an answer in each Python: this one as it is, others in virtual environments made for it."""
    seconds = "0.3" if quick else "3"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for version in PYTHONS:
        name, title = f"after-answer-{version}", f"The seconds after an answer, Python {version}"
        asked = (tiny, "--seconds", seconds)
        if version == here:
            found.append(Step(name, title, 180, asked, script="after_answer.py"))
            found.append(Step(f"bare-{version}", f"The same in coremltools alone, Python {version}", 120, asked))
            continue
        python = interpreter(version)
        if python is None:
            found.append(Step(name, title, 0, impossible=f"Python {version} is not installed"))
        elif quick or sys.platform != "darwin":
            reason = "a quick check makes no virtual environments" if quick else "this machine is not a Mac"
            found.append(Step(name, title, 0, impossible=f"Python {version} is installed, but {reason}"))
        else:
            folder = work / f"venv-{version}"
            found.append(
                Step(f"venv-{version}", f"A virtual environment of Python {version}", 300, (python, str(folder)))
            )
            found.append(Step(name, title, 180, asked, str(folder / "bin" / "python"), "after_answer.py"))
    return found


def interpreter(version: str) -> str | None:
    """A command that runs this Python; a shim of pyenv's without a Python behind it does not count."""
    home, command = Path.home(), f"python{version}"
    places = [
        shutil.which(command),
        f"/opt/homebrew/bin/{command}",
        f"/usr/local/bin/{command}",
        *map(str, sorted(home.glob(f".pyenv/versions/{version}.*/bin/{command}"), reverse=True)),
        *map(str, sorted(home.glob(f".local/share/uv/python/cpython-{version}.*/bin/{command}"), reverse=True)),
    ]
    for path in filter(None, places):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


def chosen(every: Sequence[Step], only: str) -> list[Step]:
    """The steps named in `only`, with the exports they need; all of them when it is empty."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := sorted(set(names) - {step.name for step in every}):
        raise SystemExit(
            f"--only: no step is called {', '.join(unknown)}; there are {', '.join(s.name for s in every)}"
        )
    if not names:
        return list(every)
    wanted = [step for step in every if step.name in names]
    folders = {argument for step in wanted for argument in step.arguments}
    needed = {step.name for step in every if step.name.startswith("export-") and step.arguments[1] in folders}
    return [step for step in every if step.name in {*names, *needed}]


def run_all(check: Check, asked: Sequence[Step], work: Path) -> None:
    for number, step in enumerate(asked, start=1):
        print(f"[{number}/{len(asked)}] {step.title} ... ", end="", flush=True)
        outcome = run(step, min(step.limit_s, check.seconds_left), work)
        check.add(outcome)
        print(f"{outcome.status}, {outcome.seconds:.0f} s{f': {outcome.reason}' if outcome.reason else ''}", flush=True)


def run(step: Step, limit_s: float, work: Path) -> Outcome:
    """Runs a step in a process group of its own, which is killed when the time is up."""
    if step.impossible:
        return Outcome(step.name, step.title, "not possible", reason=step.impossible)
    if limit_s < 1:
        return Outcome(step.name, step.title, "left out", reason="the half hour was over")
    named = () if step.script != "mac_steps.py" else (step.name,)
    command = [step.python, "-P", str(HERE / step.script), *named, *step.arguments]
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment(work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as reason:
        return Outcome(step.name, step.title, "failed", reason=str(reason))
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        stdout, stderr = ended(process)
        seconds = time.monotonic() - begin
        reason = f"not done after {limit_s:.0f} s"
        return Outcome(step.name, step.title, "timeout", seconds, reason, result_of(stdout), stderr[-TAIL:])
    except BaseException:
        ended(process)
        raise
    seconds, code, result = time.monotonic() - begin, process.returncode, result_of(stdout)
    outcome = Outcome(step.name, step.title, "ok", seconds, "", result, stderr[-TAIL:], code)
    if code < 0:
        outcome.status, outcome.reason = "failed", f"crashed with {signal.Signals(-code).name}"
    elif code > 0 or not result:
        outcome.status, outcome.reason = "failed", last_line(stderr) or f"exit code {code}"
    elif "not_possible" in result:
        outcome.status, outcome.reason = "not possible", result["not_possible"]
    elif "failed" in result:
        outcome.status, outcome.reason = "failed", result["failed"]
    return outcome


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Kills a step and everything that it started; what it had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr = process.communicate()
    return stdout or "", stderr or ""


def environment(work: Path) -> dict[str, str]:
    """Of a step: a cache of its own, so that first use is seen and the user's copies stay."""
    return {**os.environ, "FASTVLM_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def result_of(stdout: str) -> dict[str, Any]:
    """The last line that is a JSON object; empty when there is none."""
    for line in reversed(stdout.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def anonymous(text: str) -> str:
    """Without the user's home folder and the machine's name."""
    for secret, shown in ((str(Path.home()), "~"), (os.uname().nodename, "this-machine")):
        if len(secret) > 2:
            text = text.replace(json.dumps(secret)[1:-1], shown)
    return text


if __name__ == "__main__":
    main()
