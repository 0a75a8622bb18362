"""The measurement of a folder in a new process, so that the first answer is cold and peak memory is the folder's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...models import errors
from ...models.errors import FastVLMError, MachineError
from .measure import Measured, measure
from .reading import configuration_from
from .workload import Loading, Workload

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


if __name__ == "__main__":
    main()
