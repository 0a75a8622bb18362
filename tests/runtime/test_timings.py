"""Timings: the stages add up to the time to first token."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.runtime.timings import TTFT_STAGES, LapClock, Timings

TIMINGS = Timings(
    preprocess_ms=1.0,
    encode_ms=2.0,
    project_ms=4.0,
    prefill_ms=8.0,
    sample_ms=16.0,
    load_ms=100.0,
    image_open_ms=200.0,
    compile_ms=300.0,
    decode_tps=None,
    prompt_tokens=5,
    generated_tokens=1,
    cold=True,
)


def test_ttft_is_the_sum_of_its_stages_alone() -> None:
    assert TIMINGS.ttft_ms == 31.0
    for stage in TTFT_STAGES:
        assert replace(TIMINGS, **{stage: getattr(TIMINGS, stage) + 0.5}).ttft_ms == 31.5


@pytest.mark.parametrize("decode_tps", [None, 12.5])
def test_dictionary_holds_every_field_and_survives_json(decode_tps: float | None) -> None:
    values = json.loads(json.dumps(replace(TIMINGS, decode_tps=decode_tps).as_dict()))
    assert values.pop("ttft_ms") == 31.0
    assert Timings(**values) == replace(TIMINGS, decode_tps=decode_tps)


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=20))
def test_laps_add_up_to_the_whole(steps: list[float]) -> None:
    times = [sum(steps[: n + 1]) for n in range(len(steps))]
    ticks = iter(times)
    clock = LapClock(lambda: next(ticks))
    laps = [clock.lap_ms() for _ in steps[1:]]
    assert sum(laps) == pytest.approx(1000 * (times[-1] - times[0]), abs=1e-6)
    assert laps[0] == pytest.approx(1000 * steps[1], abs=1e-6)
