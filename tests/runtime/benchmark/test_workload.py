"""The workload: its arguments, and prompts of a given length."""

from __future__ import annotations

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.runtime.benchmark.measure import answer
from fastvlm.runtime.benchmark.workload import Workload, largest
from fastvlm.runtime.fastvlm import FastVLM


def test_prompts_are_lengthened_to_the_given_tokens(vlm: FastVLM) -> None:
    workload = Workload(max_tokens=1)
    short = answer(vlm, workload.request(workload.prompt))[1].prompt_tokens
    for wanted in (short, short + 5, 150):
        found = answer(vlm, workload.lengthened(vlm, wanted))[1].prompt_tokens
        assert wanted - 8 < found <= wanted  # the filler has a few tokens
    with pytest.raises(UsageError, match=rf"prompt_tokens must be at least {short} for .* \(got {short - 1}\)"):
        workload.lengthened(vlm, short - 1)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100])
def test_largest_is_found(limit: int) -> None:
    assert largest(lambda n: n <= limit) == limit


@pytest.mark.parametrize("change", [{"runs": 0}, {"warmup": -1}, {"max_tokens": 0}, {"runs": True}])
def test_workload_out_of_range_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} must be a whole number of at least"):
        Workload(**change)
