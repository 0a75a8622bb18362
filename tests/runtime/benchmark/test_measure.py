"""Measured answers of a small model: stages, total and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastvlm.runtime import generate as generate_module
from fastvlm.runtime import start as start_module
from fastvlm.runtime.benchmark.measure import answer, sizes_bytes
from fastvlm.runtime.benchmark.workload import Workload
from fastvlm.runtime.fastvlm import FastVLM

from ..conftest import StandingClock


def test_stages_and_decoding_add_up_to_the_answer_time(vlm: FastVLM, standing_clock: StandingClock) -> None:
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


def test_sizes_are_by_part(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    sizes = sizes_bytes(folder)
    assert sizes["encoder"] == 2  # the dummy package's `{}`
    assert sizes["decoder"] == (folder / "model.safetensors").stat().st_size
    assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
