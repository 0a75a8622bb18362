"""The workload: its cases, its arguments, and prompts of a given length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.runtime.benchmark.run import answer
from fastvlm.runtime.benchmark.workload import Case, Workload, cases_of, exported_folder, folder_case, largest
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


def test_labels_of_cases_are_unique(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "model", tmp_path / "b" / "model"
    assert [case.label for case in cases_of([one, other])] == [str(one), str(other)]
    assert [case.label for case in cases_of([one], [50, 100])] == ["model, 50 tokens", "model, 100 tokens"]
    assert cases_of([Case("named", one)])[0].label == "named"
    with pytest.raises(UsageError, match="at least one exported folder"):
        cases_of([])


def test_exported_folder_is_found_and_others_are_not(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_folder()
    assert exported_folder(str(folder)) == folder
    assert exported_folder(str(tmp_path)) is None
    assert exported_folder("tiny") is None


@pytest.mark.parametrize(("sizes", "quant", "named"), [((), "int8", "quant"), ((64,), None, "image.size")])
def test_exported_folder_keeps_its_settings(
    write_folder: Callable[..., Path], sizes: tuple[int, ...], quant: str | None, named: str
) -> None:
    folder = write_folder()
    assert folder_case(folder, (), None) == Case(folder.name, folder)
    with pytest.raises(UsageError, match=rf"{named} cannot change an exported folder .* pixels\)\. Pass a checkpoint"):
        folder_case(folder, sizes, quant)
