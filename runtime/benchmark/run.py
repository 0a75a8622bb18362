"""The benchmark of several folders and prompt lengths. Each measurement runs in a new process.

So the first answer is cold, and the peak memory is that of one folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...models import errors
from ...models.errors import FastVLMError, MachineError, UsageError
from ...models.folder_layout import PACKAGE_NAME
from ..coreml import COMPUTE_UNITS
from ..engine_share import ENGINE_UNITS, MIN_ENGINE_SHARE, planned_share
from ..evaluation.run import folder_facts
from ..fastvlm import FastVLM, load
from ..request import Request
from ..timings import TTFT_STAGES, Clock, Timings
from .machine import environment, peak_memory_bytes
from .report import Benchmark, Configuration, Process, Run, configuration_from
from .workload import Case, Loading, Workload, cases_of

COMMAND = (sys.executable, "-P", "-m", __name__)
"""The command of the new process. With -P, a folder in the working directory cannot shadow a module."""

OnStage = Callable[[str], None]

ShareOf = Callable[[Path, str], float | None]
"""A package and compute units -> the engine's share of the cost. Raises FastVLMError."""


@dataclass(frozen=True)
class Measured:
    """The result of one process."""

    configuration: Configuration
    """The configuration with this one process, labelled with the folder's name."""
    environment: dict[str, Any]


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


def measure(
    folder: str | Path, workload: Workload, loading: Loading | None = None, *, prompt_tokens: int | None = None
) -> Measured:
    """Loads the folder and measures it. The first answer is cold only in a new process.

    Raises:
        FastVLMError: the folder cannot be loaded, or an answer fails.
    """
    from ...models._mlx import mx

    surroundings = environment()  # first, so that the load average excludes this process
    loading = loading or Loading()
    model = load(folder, **asdict(loading))
    request = workload.request(workload.prompt) if prompt_tokens is None else workload.lengthened(model, prompt_tokens)
    first, timings = answer(model, request)
    for _ in range(workload.warmup):
        answer(model, request)
    runs = tuple(answer(model, request)[0] for _ in range(workload.runs))
    process = Process(
        load_ms=timings.load_ms,
        compile_ms=timings.compile_ms,
        cold=first if timings.cold else None,
        peak_memory_bytes=peak_memory_bytes(),
        mlx_peak_memory_bytes=int(mx.get_peak_memory()),
        runs=runs,
    )
    return Measured(_configuration(model, loading, timings, process), surroundings)


def answer(model: FastVLM, request: Request, clock: Clock = time.perf_counter) -> tuple[Run, Timings]:
    """Measures one answer, with an image that is not cached."""
    model.engine.clear_caches()
    stream = model.engine.stream(request)
    begin = clock()
    for _ in stream:
        pass
    answer_ms = 1000 * (clock() - begin)
    timings = stream.generation.timings
    assert timings.cached_images == 0, "the encoder's time would be missing"
    stages = {stage: getattr(timings, stage) for stage in TTFT_STAGES}
    run = Run(**stages, decode_tps=timings.decode_tps, generated_tokens=timings.generated_tokens, answer_ms=answer_ms)
    return run, timings


def _configuration(model: FastVLM, loading: Loading, timings: Timings, process: Process) -> Configuration:
    from ...models._mlx import mx

    units = compute_units_of(model, loading)
    share, remark = planned(model.folder.package, units)
    return Configuration(
        label=model.folder.path.resolve().name,
        folder=folder_facts(model.folder),
        vision=model.engine.encoder.name,
        compute_units=units_label(units, share),
        kv_bits=loading.kv_bits,
        decoder=str(mx.default_device()),
        image_size=model.config.image_size,
        image_tokens=model.config.tokens_per_image,
        prompt_tokens=timings.prompt_tokens,
        reused_tokens=timings.reused_tokens,
        sizes_bytes=sizes_bytes(model.folder.path),
        notes=(*model.notes, remark) if remark else tuple(model.notes),
        processes=(process,),
        engine_share=share,
    )


def compute_units_of(model: FastVLM, loading: Loading) -> str | None:
    """Returns the compute units that Core ML was asked for, None for another backend."""
    if model.engine.encoder.name != "coreml":
        return None
    return getattr(model.engine.encoder, "compute_units", None) or loading.compute_units or COMPUTE_UNITS[0]


def planned(package: Path, compute_units: str | None, share_of: ShareOf = planned_share) -> tuple[float | None, str]:
    """Returns the engine's share of the compute plan, and a note where the times may not be the engine's."""
    if compute_units not in ENGINE_UNITS:
        return None, ""
    try:
        share = share_of(package, compute_units)
        reason = "Core ML has no compute plan for it (macOS 14.4 or newer makes plans)"
    except FastVLMError as error:
        share, reason = None, str(error)
    if share is None:
        return None, f"it is unknown whether the Neural Engine ran the vision encoder: {reason}"
    if share >= MIN_ENGINE_SHARE:
        return share, ""
    return share, (
        f"Core ML plans {percent(share)} of the vision encoder's cost for the Neural Engine: these are not the "
        "engine's times. Run fastvlm verify FOLDER --on-device, and see fastvlm inspect FOLDER --placement"
    )


def units_label(compute_units: str | None, share: float | None) -> str | None:
    """Returns the name of a row's compute units, with the engine's share where that is the smaller part."""
    if compute_units is None or share is None or share >= MIN_ENGINE_SHARE:
        return compute_units
    return f"{compute_units} (engine {percent(share)})"


def percent(share: float) -> str:
    """Returns whole percent, rounded down: a share below the bar never looks like the bar."""
    return f"{int(100 * share)} %"


def sizes_bytes(folder: Path) -> dict[str, int]:
    """Returns bytes on disk by part: encoder (0 if it is in the weights file), decoder, other."""
    sizes = {"encoder": 0, "decoder": 0, "other": 0}
    for path in folder.rglob("*"):
        if path.is_file():
            in_package = path.relative_to(folder).parts[0] == PACKAGE_NAME
            kind = "encoder" if in_package else "decoder" if path.suffix == ".safetensors" else "other"
            sizes[kind] += path.stat().st_size
    return sizes


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
