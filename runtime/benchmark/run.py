"""The benchmark of several folders and prompt lengths. Each measurement runs in a new process.

So the first answer is cold, and the peak memory is that of one folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...models import errors
from ...models.errors import FastVLMError, MachineError, UsageError
from .measure import Measured, measure
from .report import Benchmark, Configuration, configuration_from
from .workload import Case, Loading, Workload, cases_of

COMMAND = (sys.executable, "-P", "-m", __name__)
"""The command of the new process. With -P, a folder in the working directory cannot shadow a module."""


def measure_isolated(
    folder: Path, workload: Workload, loading: Loading | None = None, *, prompt_tokens: int | None = None
) -> Measured:
    """Runs `measure` in a new process.

    Raises:
        FastVLMError: the error of `measure` in that process.
        MachineError: the process ended without a result.
    """
    order = {
        "folder": str(folder.absolute()),
        "workload": {**vars(workload), "image": str(workload.image.absolute())},
        "prompt_tokens": prompt_tokens,
        "loading": vars(loading or Loading()),
    }
    done = subprocess.run(COMMAND, input=json.dumps(order), capture_output=True, text=True, check=False)
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise MachineError(_end_of(done)) from None
    if "error" in result:
        raise getattr(errors, result["error"], FastVLMError)(result["message"])
    return Measured(configuration_from(result["configuration"]), result["environment"])


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the reason why a process has no result."""
    if done.returncode == -signal.SIGKILL:
        return "measuring process: killed, probably out of memory. Close other programs, or use a smaller model."
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"measuring process: ended with exit code {done.returncode} ({lines[-1]})."


def main() -> None:
    """Reads the order from stdin and writes the result to stdout. Other output is redirected to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the parent, which ends this process
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(_result(json.load(sys.stdin)), out)
    out.close()


def _result(order: dict[str, Any]) -> dict[str, Any]:
    values = order["workload"]
    workload = Workload(**{**values, "image": Path(values["image"])})
    try:
        loading = Loading(**order["loading"])
        found = measure(order["folder"], workload, loading, prompt_tokens=order["prompt_tokens"])
    except FastVLMError as reason:
        return {"error": type(reason).__name__, "message": str(reason)}
    return {"configuration": found.configuration.as_dict(), "environment": found.environment}


OnStage = Callable[[str], None]


def benchmark(
    folders: str | Path | Sequence[str | Path | Case],
    workload: Workload | None = None,
    *,
    prompt_tokens: Sequence[int] = (),
    processes: int = 2,
    backend: str | None = None,
    compute_units: str | None = None,
    kv_bits: int | None = None,
    on_stage: OnStage = lambda _: None,
) -> Benchmark:
    """Measures the time to first token of exported folders by stage, with memory and sizes.

    Every folder and length of `prompt_tokens` is measured in `processes` new processes. Each loads the folder and
    answers 1 + `workload.warmup` + `workload.runs` times. The folders take turns, so that noise of the machine affects
    all of them. `backend`, `compute_units` and `kv_bits` are arguments of `fastvlm.load`. `on_stage` is called with
    the label of each measurement.

    Raises:
        UsageError: an argument is out of range.
        FastVLMError: a folder cannot be loaded, or an answer fails.
    """
    if processes < 1:
        raise UsageError(f"processes must be at least 1 (got {processes}).", "processes")
    workload, loading = workload or Workload(), Loading(backend, compute_units, kv_bits)
    asked = [folders] if isinstance(folders, str | Path) else list(folders)
    cases = cases_of(asked, prompt_tokens)
    facts = workload.as_dict()  # opens the image, so that a bad one fails before anything is measured
    found: list[list[Measured]] = [[] for _ in cases]
    for turn in range(processes):
        for case, measured in zip(cases, found, strict=True):
            on_stage(f"{case.label} ({turn + 1} of {processes})")
            measured.append(measure_isolated(case.folder, workload, loading, prompt_tokens=case.prompt_tokens))
    return Benchmark(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=found[0][0].environment,
        workload=facts,
        configurations=tuple(merged(case.label, measured) for case, measured in zip(cases, found, strict=True)),
    )


def merged(label: str, measured: Sequence[Measured]) -> Configuration:
    """Returns the configuration of one case with the measurements of all its processes."""
    processes = tuple(process for one in measured for process in one.configuration.processes)
    return replace(measured[0].configuration, label=label, processes=processes)


if __name__ == "__main__":
    main()
