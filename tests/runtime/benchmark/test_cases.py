"""The cases of a benchmark and their labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm.models.errors import UsageError
from fastvlm.runtime.benchmark.cases import Case, cases_of, exported_folder, folder_case


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
