"""The benchmark of several folders, the process of each measurement, and measured answers of a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import FastVLMError, ImageError, MachineError, ModelFolderError, PackageError
from fastvlm.runtime import engine as engine_module
from fastvlm.runtime import generate as generate_module
from fastvlm.runtime.benchmark import run as run_module
from fastvlm.runtime.benchmark.markdown import about, report
from fastvlm.runtime.benchmark.report import Benchmark
from fastvlm.runtime.benchmark.run import (
    answer,
    benchmark,
    measure,
    measure_isolated,
    planned,
    sizes_bytes,
    units_label,
)
from fastvlm.runtime.benchmark.workload import Workload
from fastvlm.runtime.fastvlm import FastVLM

from ..conftest import StandingClock


def test_bad_image_fails_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        benchmark(tmp_path / "nothing", Workload(image=tmp_path / "no.png"))


@pytest.mark.slow
def test_error_of_the_process_is_raised_again(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        measure_isolated(tmp_path / "nothing", Workload())


def test_killed_or_failed_process_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(run_module, "COMMAND", (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 9)"))
    with pytest.raises(MachineError, match="measuring process: killed, probably out of memory"):
        measure_isolated(tmp_path, Workload())
    monkeypatch.setattr(run_module, "COMMAND", (sys.executable, "-c", "raise SystemExit('first\\nlast words')"))
    with pytest.raises(MachineError, match=r"exit code 1 \(last words\)"):
        measure_isolated(tmp_path, Workload())


def test_stages_and_decoding_add_up_to_the_answer_time(vlm: FastVLM, standing_clock: StandingClock) -> None:
    for owner, name, seconds in [
        (engine_module, "preprocess", 0.5),
        (vlm.engine.encoder, "encode", 4.0),
        (vlm.engine, "_project", 1.0),
        (engine_module, "prefill", 8.0),
        (engine_module, "Sampler", 2.0),
        (generate_module, "decode_one_token", 0.25),
    ]:
        standing_clock.slow(owner, name, seconds)
    run, timings = answer(vlm, Workload(max_tokens=12).request("Describe."), standing_clock)
    assert run.generated_tokens == 12
    assert run.ttft_ms == 15_500
    assert run.decode_tps == timings.decode_tps == 4
    assert run.answer_ms == 15_500 + 11 * 250
    assert run.unaccounted_ms == 0


def test_work_outside_the_stages_is_unaccounted(vlm: FastVLM, standing_clock: StandingClock) -> None:
    standing_clock.slow(vlm.engine, "generation", 1.0)
    run, _ = answer(vlm, Workload(max_tokens=1).request("Describe the image."), standing_clock)
    assert (run.ttft_ms, run.as_dict()["unaccounted_ms"]) == (0, 1000)


def test_every_run_encodes_its_image(vlm: FastVLM, standing_clock: StandingClock) -> None:
    standing_clock.slow(vlm.engine.encoder, "encode", 4.0)
    request = Workload(max_tokens=2).request("Describe the image.")
    assert [answer(vlm, request, standing_clock)[0].encode_ms for _ in range(3)] == [4000, 4000, 4000]


def test_sizes_are_by_part(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    sizes = sizes_bytes(folder)
    assert sizes["encoder"] == 2  # the dummy package's `{}`
    assert sizes["decoder"] == (folder / "model.safetensors").stat().st_size
    assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shares(share: float | FastVLMError | None) -> Callable[[Path, str], float | None]:
    """Stands in for Core ML's compute plan."""

    def share_of(package: Path, compute_units: str) -> float | None:
        if isinstance(share, FastVLMError):
            raise share
        return share

    return share_of


@pytest.mark.parametrize(
    ("units", "share", "label"),
    [
        ("CPU_AND_NE", 0.99, "CPU_AND_NE"),
        ("CPU_AND_NE", 0.5, "CPU_AND_NE"),
        ("CPU_AND_NE", 0.4999, "CPU_AND_NE (engine 49 %)"),
        ("ALL", 0.0, "ALL (engine 0 %)"),
        ("CPU_AND_NE", None, "CPU_AND_NE"),
        (None, None, None),
    ],
)
def test_row_is_the_engines_from_half_of_the_cost(units: str | None, share: float | None, label: str | None) -> None:
    assert units_label(units, share) == label


def test_small_share_of_the_engine_is_noted_with_its_number() -> None:
    share, note = planned(Path("a"), "CPU_AND_NE", shares(0.12))
    assert share == 0.12 and "plans 12 % of the vision encoder's cost" in note and "--on-device" in note
    assert planned(Path("a"), "CPU_AND_NE", shares(0.97)) == (0.97, "")


@pytest.mark.parametrize("share", [None, MachineError("macOS is too old"), PackageError("it does not compile")])
def test_unknown_share_is_noted(share: float | FastVLMError | None) -> None:
    found, note = planned(Path("a"), "ALL", shares(share))
    assert found is None and note.startswith("it is unknown whether the Neural Engine ran the vision encoder: ")


@pytest.mark.parametrize("units", ["CPU_ONLY", "CPU_AND_GPU", None])
def test_units_without_the_engine_need_no_plan(units: str | None) -> None:
    assert planned(Path("a"), units, shares(PackageError("asked"))) == (None, "")


def test_fallback_reaches_every_form_of_the_report(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.engine.encoder, "name", "coreml", raising=False)
    monkeypatch.setattr(vlm.engine.encoder, "compute_units", "CPU_AND_NE", raising=False)
    monkeypatch.setattr(run_module, "load", lambda *_, **__: vlm)
    monkeypatch.setattr(run_module, "planned", lambda package, units: planned(package, units, shares(0.12)))
    found = measure("folder", Workload(max_tokens=2, runs=1, warmup=0))
    one = found.configuration
    assert (one.compute_units, one.engine_share) == ("CPU_AND_NE (engine 12 %)", 0.12)
    assert "12 %" in one.notes[-1]
    assert one.as_dict()["engine_share"] == 0.12
    benchmark = Benchmark("2026-01-01T00:00:00+00:00", found.environment, Workload().as_dict(), (one,))
    assert any("coreml (CPU_AND_NE (engine 12 %))" in line for line in about(benchmark))
    assert "Core ML on CPU_AND_NE (engine 12 %)" in next(iter(report(benchmark)))
