"""What is measured: real answers of a small model, from inside and from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import ImageError, MachineError, ModelFolderError, UsageError
from fastvlm.runtime import generate as generate_module
from fastvlm.runtime import start as start_module
from fastvlm.runtime.benchmark.isolated import measure_isolated
from fastvlm.runtime.benchmark.machine import environment, mac_power, peak_memory_bytes
from fastvlm.runtime.benchmark.measure import answer, sizes_bytes
from fastvlm.runtime.benchmark.report import Run
from fastvlm.runtime.benchmark.run import benchmark
from fastvlm.runtime.benchmark.spread import spread_of
from fastvlm.runtime.benchmark.workload import Workload, largest
from fastvlm.runtime.fastvlm import FastVLM

from ..conftest import StandingClock


def test_stages_and_decoding_add_up_to_the_time_measured_from_outside(
    vlm: FastVLM, standing_clock: StandingClock
) -> None:
    for owner, name, seconds in [
        (start_module, "preprocess", 0.5),
        (vlm.encoder, "encode", 4.0),
        (vlm._starter, "_project", 1.0),
        (start_module, "prefill", 8.0),
        (start_module, "Sampler", 2.0),
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
    standing_clock.slow(vlm, "generation", 1.0)
    run, _ = answer(vlm, Workload(max_tokens=1).request("Describe the image."), standing_clock)
    assert (run.ttft_ms, run.as_dict()["unaccounted_ms"]) == (0, 1000)


def test_every_run_encodes_its_image(vlm: FastVLM, standing_clock: StandingClock) -> None:
    standing_clock.slow(vlm.encoder, "encode", 4.0)
    request = Workload(max_tokens=2).request("Describe the image.")
    assert [answer(vlm, request, standing_clock)[0].encode_ms for _ in range(3)] == [4000, 4000, 4000]


def test_unaccounted_time_is_what_is_left() -> None:
    run = Run(1, 2, 3, 4, 5, decode_tps=100.0, generated_tokens=3, answer_ms=40.0)
    assert run.ttft_ms == 15
    assert run.unaccounted_ms == pytest.approx(40 - 15 - 20)


def test_prompts_are_lengthened_to_the_tokens_asked_for(vlm: FastVLM) -> None:
    workload = Workload(max_tokens=1)
    short = answer(vlm, workload.request(workload.prompt))[1].prompt_tokens
    for wanted in (short, short + 5, 150):
        found = answer(vlm, workload.lengthened(vlm, wanted))[1].prompt_tokens
        assert wanted - 8 < found <= wanted  # the filler is a few tokens long
    with pytest.raises(UsageError, match=f"take {short} with"):
        workload.lengthened(vlm, short - 1)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100])
def test_largest_is_found(limit: int) -> None:
    assert largest(lambda n: n <= limit) == limit


@pytest.mark.parametrize("change", [{"runs": 0}, {"warmup": -1}, {"max_tokens": 0}, {"runs": True}])
def test_workloads_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} should be a whole number from"):
        Workload(**change)


def test_spread_interpolates() -> None:
    found = spread_of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.n, found.min, found.p50, found.p90) == (5, 1.0, 3.0, 4.6)
    assert spread_of([]) is None


def test_sizes_are_told_by_part(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    sizes = sizes_bytes(folder)
    assert sizes["encoder"] == 2  # the dummy package's `{}`
    assert sizes["decoder"] == (folder / "model.safetensors").stat().st_size
    assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["cores"] >= 1
    assert all(found[name] for name in ("chip", "os", "python", "fastvlm", "mlx", "torch", "coremltools", "blas"))
    peak = peak_memory_bytes()
    assert peak is None or peak > 20e6


def test_power_of_a_mac_is_read_from_pmset() -> None:
    """Both outputs shortened; no Mac was at hand to print them."""
    source = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234)\t85%; discharging; 5:12 remaining"
    settings = (
        "System-wide power settings:\nCurrently in use:\n standby              1\n lowpowermode         1\n sleep 1"
    )
    assert mac_power(source, settings) == "Battery power, low power mode on"
    assert mac_power("Now drawing from 'AC Power'", settings.replace("mode         1", "mode         0")) == (
        "AC power, low power mode off"
    )
    assert mac_power("", "") == ""


def test_errors_come_back_from_the_process_that_measures(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a folder"):
        measure_isolated(tmp_path / "nothing", Workload())


def test_a_bad_image_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        benchmark(tmp_path / "nothing", Workload(image=tmp_path / "no.png"))


def test_a_process_that_dies_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastvlm.runtime.benchmark import isolated

    monkeypatch.setattr(isolated, "COMMAND", (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 9)"))
    with pytest.raises(MachineError, match="was killed, perhaps for want of memory"):
        measure_isolated(tmp_path, Workload())
    monkeypatch.setattr(isolated, "COMMAND", (sys.executable, "-c", "raise SystemExit('first\\nlast words')"))
    with pytest.raises(MachineError, match="exit code 1: last words"):
        measure_isolated(tmp_path, Workload())
