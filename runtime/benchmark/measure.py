"""The measurement of a folder in this process: load, cold answer, warm-up, runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...models.errors import FastVLMError
from ...models.folder_layout import PACKAGE_NAME
from ..coreml import COMPUTE_UNITS
from ..engine_share import ENGINE_UNITS, MIN_ENGINE_SHARE, planned_share
from ..evaluation.report import folder_facts
from ..fastvlm import FastVLM, load
from ..request import Request
from ..timings import TTFT_STAGES, Clock, Timings
from .machine import environment, peak_memory_bytes
from .report import Configuration, Process, Run
from .workload import Loading, Workload

ShareOf = Callable[[Path, str], float | None]
"""A package and compute units -> the engine's share of the cost. Raises FastVLMError."""


@dataclass(frozen=True)
class Measured:
    """The result of one process."""

    configuration: Configuration
    """The configuration with this one process, labelled with the folder's name."""
    environment: dict[str, Any]


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
    model.engine.feature_cache.clear()
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
