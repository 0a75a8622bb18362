"""The benchmark of several folders and prompt lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ...models.errors import UsageError
from .cases import Case, cases_of
from .isolated import measure_isolated
from .measure import Measured
from .report import Benchmark, Configuration
from .workload import Loading, Workload

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
